"""Weights of detectors: read from wherever they were published, and loaded into students and teachers."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

from d2distill.common.engine.weights import differences, read_content, state_dict_of
from d2distill.common.errors import CheckpointError
from d2distill.detection.weight_names import BOTTOM_UP, nested_mobilenetv2_names, of_classifier, resnet_blocks

__all__ = ["CAFFE2", "DetectorWeights", "has_teacher", "load_student", "load_teacher", "read_detector"]

logger = logging.getLogger("detectron2.d2distill")

# The author by which Detectron2 knows Detectron's files.
CAFFE2 = "Caffe2"
_LIBRARIES = ("torchvision", "timm")
# What those libraries' weights were trained with, of 0..255.
_IMAGENET_MEAN, _IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class DetectorWeights:
    """What a file of weights holds.

    Attributes:
        source: where it was read from.
        state: tensors by Detectron2's names, or by what `heuristic` says; only ``backbone.bottom_up.*`` if the file
            is a classifier's.
        teacher: those of the file's ``teacher.*``, without this prefix.
        author: who made the file, as Detectron2's files tell it; ``Caffe2`` for Detectron's.
        heuristic: the names are shorter than a detector's, or Caffe2's: Detectron2's
            ``align_and_update_state_dicts`` finds the tensors' places.
    """

    source: str
    state: dict[str, Tensor]
    teacher: dict[str, Tensor]
    author: str = ""
    heuristic: bool = False


def read_detector(source: str) -> DetectorWeights:
    """Read weights of a detector or of its backbone.

    Args:
        source: a path, ``https://`` or ``detectron2://`` URL of a ``.pkl`` (Detectron2's zoo, Caffe2), ``.pth`` (also
            a run's checkpoint, MDistiller's with a teacher, or a torchvision- or timm-like classifier) or
            ``.safetensors`` file; ``torchvision:ResNet18_Weights.IMAGENET1K_V1`` or ``timm:resnet18`` (ResNets and
            MobileNetV2).

    Raises:
        CheckpointError: missing, unreachable, damaged, holding anything but weights, or of a classifier that is no
            detector's backbone.
    """
    content = read_content(source)
    author, heuristic = "", False
    if isinstance(content, Mapping):
        author = _text(content.get("__author__", ""))
        # The metadata of a safetensors file are text.
        heuristic = _text(content.get("matching_heuristics", "")) == "True"
        content = content.get("blobs", content)
        if isinstance(content, Mapping) and any(re.fullmatch(r"\w+_w", str(name)) for name in content):
            author, heuristic = CAFFE2, True
            blobs = {n: v for n, v in content.items() if isinstance(v, Tensor) and not n.endswith("_momentum")}
            content = {"model": blobs}
    state = nested_mobilenetv2_names(state_dict_of(content, source))
    backbone = None if heuristic else of_classifier(state, source)
    if backbone is not None:
        return DetectorWeights(source, backbone, {}, author or _LIBRARIES[0])
    teacher = {n.removeprefix("teacher."): v for n, v in state.items() if n.startswith("teacher.")}
    state = {n: v for n, v in state.items() if not n.startswith(("teacher.", "distillers."))}
    return DetectorWeights(source, _parameters(state), _parameters(teacher), author, heuristic)


def has_teacher(source: str | DetectorWeights) -> bool:
    """Whether `source` holds a teacher beside the student, as MDistiller's files do; False for an empty source.

    Raises:
        CheckpointError: as :func:`read_detector`.
    """
    if isinstance(source, DetectorWeights):
        return bool(source.teacher)
    return bool(source) and source.partition(":")[0] not in _LIBRARIES and bool(read_detector(source).teacher)


def load_student(
    model: nn.Module, source: str | DetectorWeights, key: str = "MODEL.WEIGHTS", complete: bool = False
) -> None:
    """Load into a detector what `source` has of it; its children ``teacher`` and ``distillers`` are left alone.

    Args:
        model: Detectron2's or one of this package.
        source: as in :func:`read_detector`, or what that returned; empty: nothing is done.
        key: the setting or flag that named the source, for errors and the log.
        complete: the source must have every tensor (for evaluation). Otherwise a backbone alone is enough, and heads
            for another number of classes are passed over with a warning (for fine-tuning).

    Raises:
        CheckpointError: as :func:`read_detector`; or nothing of the source fits, or a tensor is of another shape, or
            the ResNet is of another depth. It begins with `key`.
    """
    if not source:
        return
    weights = _read(source, key)
    _load(model, weights.state, weights, key, complete)
    if weights.author in _LIBRARIES:
        _check_input(model, weights, key)


def load_teacher(teacher: nn.Module, source: str | DetectorWeights, key: str = "TEACHER.MODEL.WEIGHTS") -> None:
    """Load a trained detector: the ``teacher.*`` of a file that has them, else its plain names.

    Args:
        teacher: the network of which the source must have every tensor.
        source: as in :func:`read_detector`, or what that returned.
        key: the setting that named the source, for errors and the log.

    Raises:
        CheckpointError: as :func:`read_detector`; or the source is empty, of another network, of another number of
            classes, or of a backbone only. It begins with `key`.
    """
    if not source:
        raise CheckpointError(f"{key} is empty: a teacher needs the weights of a trained detector")
    weights = _read(source, key)
    _load(teacher, weights.teacher or weights.state, weights, key, complete=True)


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # Old files of Detectron2 have these too; they follow from the configuration.
    return {n: v for n, v in state.items() if n not in ("pixel_mean", "pixel_std") and "cell_anchors" not in n}


def _read(source: str | DetectorWeights, key: str) -> DetectorWeights:
    try:
        return source if isinstance(source, DetectorWeights) else read_detector(source)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error


class _Comparison:
    """A detector's own tensors beside those of a file, by the detector's names."""

    def __init__(self, own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        self.own, self.state = own, state
        self.fit = {n: t for n, t in state.items() if n in own and t.shape == own[n].shape}
        self.wrong = [n for n in state if n in own and n not in self.fit]
        # Frozen batch norms have no step counters, and files from before torch 0.4.1 neither.
        self.missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
        self.unexpected = [n for n in state if n not in own and not n.endswith("num_batches_tracked")]
        # Only the number of outputs differs, in a head that may depend on the classes.
        self.heads = [
            n
            for n in self.wrong
            if not n.startswith(("backbone.", "proposal_generator.")) and state[n].shape[1:] == own[n].shape[1:]
        ]

    def shapes(self, names: list[str]) -> list[str]:
        return [f"{n} {tuple(self.state[n].shape)} instead of {tuple(self.own[n].shape)}" for n in names]


def _load(model: nn.Module, state: dict[str, Tensor], weights: DetectorWeights, key: str, complete: bool) -> None:
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(("teacher.", "distillers."))}
    where = f"{key}: {weights.source}"
    if weights.heuristic:
        state = _aligned(state, own, weights.author == CAFFE2, where)
    found = _Comparison(own, state)
    _check_depth(found, where)
    if not found.fit:
        names = f"it has {', '.join(list(state)[:3]) or 'a teacher only'}; the network has {', '.join(list(own)[:3])}"
        raise CheckpointError(f"{where}: nothing of it fits: {names}, ...")
    if complete:
        _check_trained(found, where, key)
    if len(found.heads) < len(found.wrong) or (complete and (found.missing or found.wrong)):
        facts = differences(found.missing if complete else [], [], found.shapes(found.wrong))
        raise CheckpointError(f"{where} is of another network than {type(model).__name__}: {facts}")
    with torch.no_grad():
        # In place, and by name: load_state_dict would reset frozen batch norms that a plain dict does not mention.
        for name, value in found.fit.items():
            own[name].copy_(value)
    parts = ", ".join(sorted({name.partition(".")[0] for name in found.fit}))
    logger.info(f"{where}: {len(found.fit)} of {len(own)} tensors ({parts})")
    if found.heads:
        heads = ", ".join(found.shapes(found.heads))
        logger.warning(f"{where}: heads for another number of classes are not loaded: {heads}")
    left = [n for n in found.missing if n.startswith(BOTTOM_UP)]
    # The names that the heuristics leave over are those of an ImageNet classifier.
    unexpected = [] if weights.heuristic else found.unexpected
    if left or unexpected:
        logger.warning(f"{where} is not quite of this network: {differences(left, unexpected, [])}")


def _check_depth(found: _Comparison, where: str) -> None:
    # Every name of a ResNet-50 is in a ResNet-101, with the same shapes.
    theirs, mine = resnet_blocks(found.state), resnet_blocks(found.own)
    for stage in sorted(theirs.keys() & mine.keys()):
        if theirs[stage] != mine[stage]:
            raise CheckpointError(
                f"{where} is of a ResNet of another depth: its {stage} has {theirs[stage]} blocks, the network's "
                f"{mine[stage]}; see MODEL.RESNETS.DEPTH"
            )


def _check_trained(found: _Comparison, where: str, key: str) -> None:
    heads = [name for name in found.own if not name.startswith("backbone.")]
    if heads and not any(name in found.state for name in heads):
        raise CheckpointError(f"{where} holds ImageNet backbone weights, not a trained detector")
    (theirs, node), (mine, _) = _num_classes(found.state), _num_classes(found.own)
    if found.heads and theirs and mine and theirs != mine:
        prefix = key.removesuffix("WEIGHTS") if key.endswith("MODEL.WEIGHTS") else "MODEL."
        raise CheckpointError(
            f"{where} has {theirs} classes, but the network is built for {mine}; use weights for the same classes, or "
            f"set {prefix}{node}.NUM_CLASSES"
        )


def _num_classes(state: Mapping[str, Tensor]) -> tuple[int, str]:
    """Number of classes without the background (0 if unknown), and the node of MODEL that sets it."""
    for name, value in state.items():
        if name.startswith("roi_heads.box_predictor") and name.endswith("cls_score.bias"):
            return len(value) - 1, "ROI_HEADS"
        if name == "head.cls_score.bias" and "head.bbox_pred.bias" in state:
            # Both have a row for each anchor.
            return len(value) * 4 // len(state["head.bbox_pred.bias"]), "RETINANET"
    return 0, ""


def _aligned(state: dict[str, Tensor], own: dict[str, Tensor], caffe2: bool, where: str) -> dict[str, Tensor]:
    try:
        found = align_and_update_state_dicts(own, state, c2_conversion=caffe2)
    except (AssertionError, ValueError) as error:
        raise CheckpointError(f"{where} is of another network: {error}") from error
    result = {}
    for name, value in found.items():
        # Detectron2 leaves out with a warning what has another shape: under its full name it will be found wrong.
        full = [n for n in own if n not in found and n.endswith("." + name)]
        result[full[0] if name not in own and len(full) == 1 else name] = value
    for name in own:
        # Caffe2's batch norms are a scale and a shift only.
        base, _, last = name.rpartition(".")
        if last in ("running_mean", "running_var") and f"{base}.weight" in result and name not in result:
            result[name] = torch.zeros_like(own[name]) if last == "running_mean" else torch.ones_like(own[name])
    return result


def _check_input(model: nn.Module, weights: DetectorWeights, key: str) -> None:
    """Warn where a classifier's weights would see other images, or strides, than those they were trained with."""
    wanted = []
    if getattr(model, "input_format", None) not in (None, "RGB"):
        wanted.append("INPUT.FORMAT RGB")
    for node, values in (("pixel_mean", _IMAGENET_MEAN), ("pixel_std", _IMAGENET_STD)):
        own = getattr(model, node, None)
        if own is not None and (own.flatten().cpu() - torch.tensor(values)).abs().max() > 5:
            wanted.append(f"MODEL.{node.upper()} {list(values)}")
    blocks = [block for block in model.modules() if isinstance(block, BottleneckBlock)]
    if any(block.conv1.stride != (1, 1) for block in blocks):
        wanted.append("MODEL.RESNETS.STRIDE_IN_1X1 False")
    if wanted:
        logger.warning(f"{key}: {weights.source} ({weights.author}) was trained with other settings: set {wanted}")
