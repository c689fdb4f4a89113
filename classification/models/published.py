"""How a library's published network was given its images."""

import math
from dataclasses import dataclass

from torchvision.models import GoogLeNet_Weights, Inception_V3_Weights, get_model_weights, get_weight

__all__ = ["InputSpec", "published_input"]


@dataclass(frozen=True)
class InputSpec:
    """What a network expects of an image.

    Attributes:
        mean, std: per channel in RGB order, on the 0..255 scale.
        size: side in pixels of the square it is given.
        resize: short side in pixels to which a test image is resized before the center crop of `size`.
        interpolation: of that: "bilinear" or "bicubic".
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    resize: int
    interpolation: str


def published_input(name: str) -> InputSpec | None:
    """What the library says of ``timm:NAME``, ``torchvision:NAME`` or ``torchvision:WEIGHTS``; None if nothing."""
    library, _, name = name.partition(":")
    return {"timm": _timm, "torchvision": _torchvision}.get(library, lambda name: None)(name)


def _timm(name: str) -> InputSpec | None:
    try:
        import timm
        from timm.data import resolve_data_config
    except ImportError:
        return None  # said when the network is built
    published = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if published is None:
        return None
    found = resolve_data_config(pretrained_cfg=published.to_dict())
    mean, std = (tuple(255 * value for value in found[key]) for key in ("mean", "std"))
    size = found["input_size"][-1]
    return InputSpec(mean, std, size, math.floor(size / found["crop_pct"]), found["interpolation"])


def _torchvision(name: str) -> InputSpec | None:
    try:
        weights = get_weight(name) if "_Weights." in name else get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):
        return None
    found = weights.transforms()
    mean, std = (tuple(255 * value for value in values) for values in (found.mean, found.std))
    if isinstance(weights, GoogLeNet_Weights | Inception_V3_Weights):
        # With these weights torchvision's builders turn on `transform_input`, which makes this of its own statistics.
        mean = std = (127.5, 127.5, 127.5)
    return InputSpec(mean, std, found.crop_size[0], found.resize_size[0], found.interpolation.value)
