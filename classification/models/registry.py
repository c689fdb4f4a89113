"""Names of models and the function that builds them."""

from collections.abc import Callable

from torch import nn

from d2distill.common.errors import did_you_mean

from .library_timm import build_timm
from .library_torchvision import build_torchvision

ZOOS = ("cifar", "tiny_imagenet", "imagenet")

_LIBRARIES = {"timm": build_timm, "torchvision": build_torchvision}

_BUILDERS: dict[str, Callable[[int], nn.Module]] = {}


def register(name: str) -> Callable[[Callable[[int], nn.Module]], Callable[[int], nn.Module]]:
    """Decorator: make ``builder(num_classes) -> model`` known under a qualified name, ``"zoo/model"``.

    Raises:
        ValueError: the name is taken, or names no known zoo.
    """
    if name.split("/")[0] not in ZOOS or name.count("/") != 1:
        raise ValueError(f"model name {name!r} should be 'zoo/model' with one of the zoos {', '.join(ZOOS)}")
    if name in _BUILDERS:
        raise ValueError(f"model {name!r} is already registered")

    def add(builder: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
        _BUILDERS[name] = builder
        return builder

    return add


def model_names() -> list[str]:
    """The zoo's qualified names, such as ``"cifar/resnet56"``, sorted. Library models are not listed."""
    return sorted(_BUILDERS)


def build_model(
    name: str, num_classes: int, zoo: str = "cifar", image_size: int | tuple[int, int] | None = None
) -> nn.Module:
    """Build a classifier with fresh weights.

    Args:
        name: a qualified name (``"imagenet/ResNet34"``), a bare one (``"resnet32x4"``: the zoo ``zoo`` is
            tried first, then cifar, tiny_imagenet, imagenet), or a library's model: ``"timm:NAME"``,
            ``"torchvision:NAME"``.
        num_classes: width of the classifier, the only part of a zoo model that depends on it.
        zoo: where bare names are looked up first: ``"cifar"``, ``"tiny_imagenet"`` or ``"imagenet"``.
        image_size: the side or (height, width) of the images, for library models with a fixed input size
            (vision transformers). Every other model takes any size and ignores it.

    Returns:
        A module in training mode: ``model(images)`` gives (N, num_classes) logits for normalised images
        (N, 3, H, W); ``model.outputs(images)`` gives :class:`d2distill.common.outputs.Outputs`;
        ``model.bn_before_relu`` is a list of batch norms or None, see :class:`.base.ZooModel`.

    Raises:
        ValueError: unknown name or zoo, or ``num_classes`` below 1.
        ImportError: a ``timm:`` name without timm installed.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes should be at least 1, got {num_classes}")
    if zoo not in ZOOS:
        raise ValueError(f"unknown zoo {zoo!r}, should be one of {', '.join(ZOOS)}")
    prefix, _, library_name = name.partition(":")
    if library_name and prefix in _LIBRARIES:
        return _LIBRARIES[prefix](library_name, num_classes, image_size)
    for candidate in (name, f"{zoo}/{name}", *(f"{z}/{name}" for z in ZOOS)):
        if candidate in _BUILDERS:
            return _BUILDERS[candidate](num_classes)
    known = [*_BUILDERS, *(n.split("/")[1] for n in _BUILDERS)]
    raise ValueError(
        f"unknown model {name!r}{did_you_mean(name, known)}; "
        f"model_names() lists the zoo, library models are 'timm:NAME' and 'torchvision:NAME'"
    )
