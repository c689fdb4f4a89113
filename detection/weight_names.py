"""Convert tensor names of classifiers and of other detectors to those of Detectron2's FPN backbones."""

import re
from collections.abc import Mapping

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from torch import Tensor

from d2distill.common.errors import CheckpointError

__all__ = ["BOTTOM_UP", "convert_caffe2", "convert_classifier_backbone", "nested_mobilenetv2_names"]

BOTTOM_UP = "backbone.bottom_up."

# Index of the first block of each of timm's stages among torchvision's blocks.
_TIMM_STAGES = (1, 2, 4, 7, 11, 14, 17)
# Places of timm's modules in a block of torchvision; the first block has no expansion.
_TIMM_BLOCK = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2", "bn3": "3"}
_TIMM_FIRST_BLOCK = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
# The same for the places in MDistiller's files, in which a block is flat and activations count.
_FLAT_BLOCK = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}
_FLAT_FIRST_BLOCK = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}


def convert_classifier_backbone(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor] | None:
    """Extract the backbone of torchvision's or timm's ResNet or MobileNetV2, named as in Detectron2's FPN.

    The classifier, MobileNetV2's last convolution and the batch norms' step counters are left out.

    Returns:
        Tensors named ``backbone.bottom_up.*``, or None if `state` is not of such a classifier.

    Raises:
        CheckpointError: it is of a variant that has other layers; `source` is named.
    """
    if {"conv1.weight", "layer1.0.conv1.weight"} <= state.keys():
        rename, left_out = _resnet_name, ("fc.",)
        pattern = r"(stem|res[2-5]\.\d+)\.(conv\d|shortcut)(\.norm)?\.\w+"
    elif "conv_stem.weight" in state:
        rename, left_out = _timm_mobilenetv2_name, ("conv_head.", "bn2.", "classifier.")
        pattern = r"features\.\d+\.\S+"
    elif "features.17.conv.2.weight" in state:
        rename, left_out, pattern = str, ("features.18.", "classifier."), r"features\.\S+"
    else:
        return None
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith(left_out) or name.endswith("num_batches_tracked"):
            continue
        new = rename(name)
        if new in named or not re.fullmatch(pattern, new):
            raise CheckpointError(f"{source} is of a ResNet or MobileNetV2 that detectors here lack: it has a {name}")
        named[new] = value
    return {BOTTOM_UP + name: value for name, value in named.items()}


def _resnet_name(name: str) -> str:
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    # torchvision counts its stages from 1; for Detectron2 the stem is the first.
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")


def _timm_mobilenetv2_name(name: str) -> str:
    if found := re.fullmatch(r"blocks\.([0-6])\.(\d+)\.(\w+)\.(\w+)", name):
        index = _TIMM_STAGES[int(found[1])] + int(found[2])
        place = (_TIMM_FIRST_BLOCK if index == 1 else _TIMM_BLOCK).get(found[3])
        return f"features.{index}.conv.{place}.{found[4]}" if place else name
    return re.sub(r"^bn1\.", "features.0.1.", re.sub(r"^conv_stem\.", "features.0.0.", name))


def nested_mobilenetv2_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the flat MobileNetV2 blocks of MDistiller's files (``features.2.conv.7``) as in torchvision."""
    if not any(name.endswith("features.2.conv.7.weight") for name in state):
        return dict(state)

    def rename(found: re.Match) -> str:
        places = _FLAT_FIRST_BLOCK if found[2] == "1" else _FLAT_BLOCK
        return f"{found[1]}.{places.get(found[3], found[3])}.{found[4]}"

    return {re.sub(r"^(.*\bfeatures\.(\d+)\.conv)\.(\d)\.(\w+)$", rename, n): value for n, value in state.items()}


def convert_caffe2(blobs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert Caffe2's names to Detectron2's without their prefixes, which its matching heuristics find."""
    blobs = {n: v for n, v in blobs.items() if isinstance(v, Tensor) and not n.endswith("_momentum")}
    state, _ = convert_c2_detectron_names(blobs)
    # Caffe2's batch norms have a scale and a shift only.
    for name in [n for n in state if n.endswith("norm.weight")]:
        norm = name.removesuffix("weight")
        state.setdefault(f"{norm}running_mean", torch.zeros_like(state[name]))
        state.setdefault(f"{norm}running_var", torch.ones_like(state[name]))
    return state
