"""Tensor names: of torchvision's and timm's classifiers, and of other detectors, into those of Detectron2's FPN."""

import re
from collections.abc import Mapping

from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from torch import Tensor

from d2distill.common.errors import CheckpointError

__all__ = ["BOTTOM_UP", "nested_mobilenetv2_names", "of_classifier", "of_fpn_backbone", "resnet_blocks"]

BOTTOM_UP = "backbone.bottom_up."

_RESNET = (
    (re.compile(r"conv1\.(\w+)"), r"stem.conv1.\1"),
    (re.compile(r"bn1\.(\w+)"), r"stem.conv1.norm.\1"),
    (re.compile(r"layer([1-4]\.\d+\.conv\d\.\w+)"), r"res\1"),
    (re.compile(r"layer([1-4]\.\d+)\.bn(\d)\.(\w+)"), r"res\1.conv\2.norm.\3"),
    (re.compile(r"layer([1-4]\.\d+)\.downsample\.0\.(\w+)"), r"res\1.shortcut.\2"),
    (re.compile(r"layer([1-4]\.\d+)\.downsample\.1\.(\w+)"), r"res\1.shortcut.norm.\2"),
)
# Places within a block's torchvision `conv`, by timm's names; the first block has no expansion.
_TIMM_BLOCK = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2", "bn3": "3"}
_TIMM_FIRST_BLOCK = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
# The same by the flat places of MDistiller's files, in which the activations count.
_FLAT_BLOCK = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}
_FLAT_FIRST_BLOCK = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}
_FLAT = re.compile(r"((?:teacher\.)?(?:backbone\.bottom_up\.)?features\.(\d+)\.conv)\.(\d)\.(\w+)")
_MOBILENETV2_BLOCKS = 17


def of_classifier(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor] | None:
    """The backbone of torchvision's or timm's ResNet or MobileNetV2, named as in Detectron2's FPN.

    The classifier, MobileNetV2's last convolution and the batch norms' step counters are left out.

    Returns:
        Tensors named ``backbone.bottom_up.*``, or None if `state` is of no such classifier.

    Raises:
        CheckpointError: it is of a variant (other stem, other width, added layers) that the detectors' backbones are
            not; `source` is named.
    """
    if {"conv1.weight", "layer1.0.conv1.weight"} <= state.keys():
        named, shapes = _of_resnet(state, source), {"stem.conv1.weight": (64, 3, 7, 7)}
    elif "conv_stem.weight" in state:
        named, shapes = _of_timm_mobilenetv2(state, source), None
    elif "features.0.0.weight" in state:
        named = {name: value for name, value in state.items() if not re.match(r"features\.18\.|classifier\.", name)}
        shapes = None
    else:
        return None
    shapes = shapes or {"features.0.0.weight": (32, 3, 3, 3), "features.17.conv.2.weight": (320, 960, 1, 1)}
    for name, shape in shapes.items():
        found = tuple(named[name].shape) if name in named else None
        if found != shape:
            raise CheckpointError(f"{source} is of a variant that detectors here lack: {name} is {found}, not {shape}")
    return {BOTTOM_UP + n: value for n, value in named.items() if not n.endswith("num_batches_tracked")}


def nested_mobilenetv2_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the flat MobileNetV2 names of MDistiller's files (``features.2.conv.7``) made torchvision's."""
    parts = {name: _FLAT.fullmatch(name) for name in state}
    # torchvision's blocks end at place 3.
    if not any(part and part[3] in "467" for part in parts.values()):
        return dict(state)
    named = {}
    for name, value in state.items():
        if parts[name]:
            block, index, place, rest = parts[name].groups()
            places = _FLAT_FIRST_BLOCK if index == "1" else _FLAT_BLOCK
            name = f"{block}.{places.get(place, place)}.{rest}"
        named[name] = value
    return named


def of_fpn_backbone(state: Mapping[str, Tensor], caffe2: bool) -> dict[str, Tensor]:
    """The ResNet of ImageNet weights from Detectron2's model zoo, named as in its FPN; their classifier is left out."""
    names = convert_basic_c2_names(list(state)) if caffe2 else list(state)
    named = zip(names, state.values(), strict=True)
    return {BOTTOM_UP + name: value for name, value in named if re.match(r"stem\.conv|res[2-5]\.", name)}


def resnet_blocks(names: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of blocks of each ResNet stage, ``{"res2": 3, ...}``; empty for other backbones."""
    found = {match.groups() for name in names if (match := re.search(r"(?:^|\.)(res[2-5])\.(\d+)\.", name))}
    return {stage: sum(s == stage for s, _ in found) for stage in sorted({stage for stage, _ in found})}


def _of_resnet(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    named = {}
    for name, value in state.items():
        if name.startswith("fc."):
            continue
        target = next((match.expand(new) for old, new in _RESNET if (match := old.fullmatch(name))), None)
        if target is None:
            raise CheckpointError(f"{source} is of a ResNet that Detectron2 lacks: it has a {name}")
        # torchvision counts its stages from 1, Detectron2 the stem as the first.
        named[re.sub(r"^res(\d)", lambda stage: f"res{int(stage[1]) + 1}", target)] = value
    return named


def _of_timm_mobilenetv2(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    block = re.compile(r"blocks\.(\d+)\.(\d+)\.(\w+)\.(\w+)")
    parts = {name: block.fullmatch(name) for name in state}
    order = sorted({(int(part[1]), int(part[2])) for part in parts.values() if part})
    named = {}
    for name, value in state.items():
        module, _, rest = name.rpartition(".")
        if module in ("conv_head", "bn2", "classifier"):
            continue
        if module in ("conv_stem", "bn1"):
            named[f"features.0.{0 if module == 'conv_stem' else 1}.{rest}"] = value
            continue
        index = 1 + order.index((int(parts[name][1]), int(parts[name][2]))) if parts[name] else 0
        place = (_TIMM_FIRST_BLOCK if index == 1 else _TIMM_BLOCK).get(parts[name][3]) if index else None
        if place is None or index > _MOBILENETV2_BLOCKS:
            raise CheckpointError(f"{source} is of another network than MobileNetV2: it has a {name}")
        named[f"features.{index}.conv.{place}.{rest}"] = value
    return named
