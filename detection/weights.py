"""Load weights of detectors, from any published form, into students and teachers."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

from d2distill.common.engine.class_order import classes_in
from d2distill.common.engine.weight_files import (
    LIBRARIES,
    Mismatch,
    check_finite,
    compare_states,
    description_in,
    preprocess_in,
    read_content,
    state_dict_of,
)
from d2distill.common.errors import CheckpointError
from d2distill.detection.weight_names import (
    BOTTOM_UP,
    convert_caffe2,
    convert_classifier_backbone,
    nested_mobilenetv2_names,
)

__all__ = ["DetectorWeights", "has_teacher", "load_student", "load_teacher", "read_detector"]

logger = logging.getLogger("detectron2.d2distill")

# What the libraries' classifiers were trained with, of 0..255.
_IMAGENET = ("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@dataclass(frozen=True)
class DetectorWeights:
    """The content of a file of weights.

    Attributes:
        source: where it was read from.
        state: tensors by Detectron2's names; only ``backbone.bottom_up.*`` if the file is a classifier's.
        teacher: those of the file's ``teacher.*``, without this prefix.
        author: as Detectron2's files name it; ``torchvision`` or ``timm`` for their classifiers.
        images: the channels' order, mean and deviation that it was trained with, where that is known.
        classes: the names of its classes in their order, where they are known.
        matching_heuristics: the names lack their prefixes, and Detectron2's ``align_and_update_state_dicts`` finds
            where the tensors belong.
    """

    source: str
    state: dict[str, Tensor]
    teacher: dict[str, Tensor]
    author: str = ""
    matching_heuristics: bool = False
    images: tuple[str, Sequence[float], Sequence[float]] | None = None
    classes: Sequence[str] = ()


def read_detector(source: str) -> DetectorWeights:
    """Read weights of a detector or of its backbone.

    Args:
        source: a path, ``https://`` or ``detectron2://`` URL of a ``.pkl`` (Detectron2's zoo, Caffe2), ``.pth`` (also
            a run's checkpoint, MDistiller's with a teacher, or a classifier as of torchvision or timm) or
            ``.safetensors`` file; ``torchvision:ResNet18_Weights.IMAGENET1K_V1`` or ``timm:resnet18`` (ResNets and
            MobileNetV2).

    Raises:
        CheckpointError: missing, unreachable, damaged, with other content than weights, or of a classifier that is
            not a detector's backbone.
    """
    content = read_content(source)
    author, heuristics = "", False
    if isinstance(content, Mapping):
        author = str(content.get("__author__", ""))
        # The metadata of a safetensors file are text.
        heuristics = str(content.get("matching_heuristics", "")) == "True"
        # Detectron's detectors are under "blobs"; its ImageNet weights are bare.
        blobs = content.get("blobs", content.get("model", content))
        if isinstance(blobs, Mapping) and any(re.fullmatch(r"\w+_w", str(name)) for name in blobs):
            state = convert_caffe2(blobs)
            check_finite(state, source)
            return DetectorWeights(source, state, {}, matching_heuristics=True)
    state = state_dict_of(content, source)
    if heuristics:
        return DetectorWeights(source, _without_constants(state), {}, author, heuristics)
    state = nested_mobilenetv2_names(state)
    backbone = convert_classifier_backbone(state, source)
    if backbone is not None:
        return DetectorWeights(source, backbone, {}, author or LIBRARIES[0], images=_IMAGENET)
    teacher = {n.removeprefix("teacher."): v for n, v in state.items() if n.startswith("teacher.")}
    state = {n: v for n, v in state.items() if not n.startswith(("teacher.", "distillers."))}
    description = description_in(content)
    known = {"images": preprocess_in(description, "format", "mean", "std"), "classes": classes_in(description)}
    return DetectorWeights(source, _without_constants(state), _without_constants(teacher), author, **known)


def has_teacher(source: str) -> bool:
    """Whether `source` holds a teacher beside the student, as MDistiller's files do; False for an empty source."""
    return bool(source) and source.partition(":")[0] not in LIBRARIES and bool(read_detector(source).teacher)


def load_student(model: nn.Module, source: str, key: str = "MODEL.WEIGHTS", complete: bool = False) -> Sequence[str]:
    """Load what `source` has of a detector. The model's children ``teacher`` and ``distillers`` are not touched.

    Args:
        model: Detectron2's or one of this package.
        source: as in :func:`read_detector`; nothing is done if it is empty.
        key: the config key or flag that named the source, for errors and the log.
        complete: the source must have every tensor, as for evaluation. Otherwise a backbone alone is enough, and heads
            for another number of classes are skipped with a warning, as for fine-tuning.

    Returns:
        The classes that `source` was trained on, in their order; empty where it does not name them.

    Raises:
        CheckpointError: as :func:`read_detector`; or nothing of the source fits, or a tensor has another shape, or the
            ResNet another depth. It begins with `key`.
    """
    return _load(model, source, key, complete) if source else ()


def load_teacher(teacher: nn.Module, source: str, key: str = "TEACHER.MODEL.WEIGHTS") -> Sequence[str]:
    """Load a whole trained detector, as :func:`load_student`: the ``teacher.*`` of a file that has them, else all."""
    if not source:
        raise CheckpointError(f"{key} is empty: a teacher needs the weights of a trained detector")
    return _load(teacher, source, key, complete=True, node="TEACHER.MODEL")


def _without_constants(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # Old files of Detectron2 hold these too, but they follow from the configuration.
    return {n: v for n, v in state.items() if n not in ("pixel_mean", "pixel_std") and "cell_anchors" not in n}


def _load(model: nn.Module, source: str, key: str, complete: bool, node: str = "MODEL") -> Sequence[str]:
    """Load `source`; `node` is where the configuration has the model's settings."""
    try:
        weights = read_detector(source)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    state = weights.teacher if weights.teacher and node.startswith("TEACHER") else weights.state
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(("teacher.", "distillers."))}
    where = f"{key}: {source}"
    if weights.matching_heuristics:
        state = align_and_update_state_dicts(own, state, c2_conversion=False)
        # It leaves tensors of another shape under their short name. Under the full one they are found below.
        full = {short: name for name in own.keys() - state.keys() for short in state if name.endswith(f".{short}")}
        state = {full.get(name, name): value for name, value in state.items()}
    found = compare_states(own, state)
    fitting = [n for n in state if n in own and n not in found.shapes]
    # Heads of which only the number of outputs differs, which may be due to the classes.
    heads = {
        name: shapes
        for name, shapes in found.shapes.items()
        if not name.startswith(("backbone.", "proposal_generator.")) and shapes[0][1:] == shapes[1][1:]
    }
    # A ResNet-101 has every name of a ResNet-50, with the same shapes.
    theirs, mine = _stage_depths(state), _stage_depths(own)
    for stage in sorted(theirs.keys() & mine.keys()):
        if theirs[stage] != mine[stage]:
            raise CheckpointError(
                f"{where} is of a ResNet of another depth: its {stage} has {theirs[stage]} blocks, the network's "
                f"{mine[stage]}; see MODEL.RESNETS.DEPTH"
            )
    if not fitting:
        names = f"it has {', '.join(list(state)[:3]) or 'a teacher only'}; the network has {', '.join(list(own)[:3])}"
        raise CheckpointError(f"{where}: nothing of it fits: {names}, ...")
    if complete and all(name.startswith("backbone.") for name in own.keys() & state.keys()):
        raise CheckpointError(f"{where} holds ImageNet backbone weights, not a trained detector")
    if complete and heads:
        head = "RETINANET" if any(name.startswith("head.") for name in heads) else "ROI_HEADS"
        raise CheckpointError(
            f"{where} is for another number of classes: {Mismatch([], [], heads)}; use weights for the same classes, "
            f"or set {node}.{head}.NUM_CLASSES to theirs, all of which the data must list under 'categories'"
        )
    if len(heads) < len(found.shapes) or (complete and found.missing):
        found = found._replace(missing=found.missing if complete else [], unexpected=[])
        raise CheckpointError(f"{where} is of another network than {type(model).__name__}: {found}")
    with torch.no_grad():
        # By name and in place: load_state_dict resets the frozen batch norms that a plain dict does not mention.
        for name in fitting:
            own[name].copy_(state[name])
    parts = ", ".join(sorted({name.partition(".")[0] for name in fitting}))
    logger.info(f"{where}: {len(fitting)} of {len(own)} tensors ({parts})")
    if heads:
        logger.warning(f"{where}: skipped heads for another number of classes: {Mismatch([], [], heads)}")
    # Names that the heuristics do not match are those of an ImageNet classifier.
    unexpected = [] if weights.matching_heuristics else found.unexpected
    rest = Mismatch([n for n in found.missing if n.startswith(BOTTOM_UP)], unexpected, {})
    if any(rest):
        logger.warning(f"{where} is not exactly of this network: {rest}")
    if weights.images is not None:
        _check_input(model, weights, where, node.removesuffix("MODEL"))
    return weights.classes


def _stage_depths(names: Iterable[str]) -> Counter[str]:
    blocks = {found.groups() for name in names if (found := re.search(r"\b(res[2-5])\.(\d+)\.", name))}
    return Counter(stage for stage, _ in blocks)


def _check_input(model: nn.Module, weights: DetectorWeights, where: str, prefix: str) -> None:
    """Warn if weights would see other images, or a classifier's other strides, than in their training."""
    wanted, (channels, mean, std) = [], weights.images
    if model.input_format != channels:
        wanted.append(f"{prefix}INPUT.FORMAT {channels}")
    for node, values in (("pixel_mean", mean), ("pixel_std", std)):
        if (getattr(model, node).flatten().cpu() - torch.tensor(values)).abs().max() > 5:
            wanted.append(f"{prefix}MODEL.{node.upper()} {list(values)}")
    blocks = (block for block in model.modules() if isinstance(block, BottleneckBlock))
    if weights.author in LIBRARIES and any(block.conv1.stride != (1, 1) for block in blocks):
        wanted.append("MODEL.RESNETS.STRIDE_IN_1X1 False")
    if wanted:
        logger.warning(f"{where} ({weights.author or 'd2distill'}) was trained with other settings: set {wanted}")
