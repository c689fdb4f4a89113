"""Names of models and the function that builds them."""

from torch import nn

from d2distill.classification.registry import NamedRegistry
from d2distill.common.errors import did_you_mean

from .library import build_timm, build_torchvision

MODEL_REGISTRY = NamedRegistry("model")
_LIBRARIES = {"timm": build_timm, "torchvision": build_torchvision}
#: ``register("family/model")`` makes ``builder(num_classes) -> model`` known under that name.
register = MODEL_REGISTRY.register_as
#: The qualified names, such as ``"cifar/resnet56"``, sorted. Models of timm and torchvision are not listed.
model_names = MODEL_REGISTRY.names


def build_model(
    name: str, num_classes: int, model_family: str = "cifar", image_size: int | tuple[int, int] | None = None
) -> nn.Module:
    """Build a classifier with fresh weights.

    Args:
        name: a qualified name (``"imagenet/ResNet34"``), a bare one (``"resnet32x4"``: ``model_family`` is tried
            first, then cifar, tiny_imagenet, imagenet), or a library's model: ``"timm:NAME"``, ``"torchvision:NAME"``.
        num_classes: width of the classifier. 0, for models of timm, is none: ``model(images)`` then gives the pooled
            vectors, and ``outputs`` no logits.
        image_size: the side or (height, width) of the images, for library models with a fixed input size
            (vision transformers). Every other model takes any size and ignores it.

    Returns:
        A module in training mode: ``model(images)`` gives (N, num_classes) logits for normalized images
        (N, 3, H, W); ``model.outputs(images)`` gives :class:`d2distill.common.outputs.Outputs`;
        ``model.classifier_layer`` is the module from ``pooled`` to logits, or None where no single one does that;
        ``model.bn_before_relu`` is a list of batch norms or None, see :class:`.base.FeatureClassifier`.

    Raises:
        ValueError: unknown name or family, or no classes for a model that needs some.
    """
    library, _, library_name = name.partition(":")
    if num_classes < 1 and not (num_classes == 0 and library == "timm"):
        raise ValueError(f"{name} needs a number of classes, got {num_classes}; only timm: models can do without (0)")
    if library_name and library in _LIBRARIES:
        return _LIBRARIES[library](library_name, num_classes, image_size)
    families = {known.split("/")[0] for known in model_names()}
    if model_family not in families:
        raise ValueError(f"unknown model family {model_family!r}, should be one of {', '.join(sorted(families))}")
    for prefix in ("", f"{model_family}/", "cifar/", "tiny_imagenet/", "imagenet/"):
        if prefix + name in MODEL_REGISTRY:
            return MODEL_REGISTRY.get(prefix + name)(num_classes)
    known = [*model_names(), *(known.split("/")[-1] for known in model_names())]
    raise ValueError(
        f"unknown model {name!r}{did_you_mean(name, known)}; model_names() lists those of this package, "
        "library models are 'timm:NAME' and 'torchvision:NAME'"
    )
