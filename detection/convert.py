"""Files of weights made of files of weights, in forms that stock Detectron2 loads too."""

from pathlib import Path

import torch

from d2distill.common.engine.checkpoint import write_atomically
from d2distill.common.errors import CheckpointError, ConfigError
from d2distill.detection.weight_names import BOTTOM_UP, of_fpn_backbone
from d2distill.detection.weights import CAFFE2, DetectorWeights, read_detector

__all__ = ["check_outputs", "convert_backbone", "copy_safely", "merge", "split", "write_detector"]


def write_detector(path: str | Path, weights: DetectorWeights) -> str:
    """Write `weights` to a ``.pth`` or ``.safetensors`` file, the teacher's as ``teacher.*``; atomically.

    Returns:
        A line that says what was written.

    Raises:
        ConfigError: the path ends with neither.
    """
    check_outputs([path], force=True)
    teacher = {f"teacher.{name}": value for name, value in weights.teacher.items()}
    # A view would be saved with all that it is a view of.
    state = {name: value.detach().clone().contiguous() for name, value in {**weights.state, **teacher}.items()}
    facts = {"__author__": weights.author, **({"matching_heuristics": True} if weights.heuristic else {})}
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import save

        content = save(state, {"format": "pt", **{name: str(value) for name, value in facts.items()}})
        write_atomically(path, lambda file: file.write(content))
    else:
        write_atomically(path, lambda file: torch.save({"model": state, **facts}, file))
    parts = sorted({_part(name) for name in state})
    return f"wrote {path}: {len(state)} tensors ({', '.join(parts)})"


def check_outputs(paths: list[str | Path], force: bool) -> None:
    """Check that `paths` can be written.

    Raises:
        ConfigError: one is of an unknown kind, its folder does not exist, or it exists and `force` is not set.
    """
    for path in map(Path, paths):
        if path.suffix not in (".pth", ".safetensors"):
            raise ConfigError(f"{path} must end with .pth or .safetensors")
        if not path.parent.is_dir():
            raise ConfigError(f"there is no folder {path.parent.absolute()}")
        if path.exists() and not force:
            raise ConfigError(f"{path} exists; --force replaces it")


def convert_backbone(source: str, out: str | Path, force: bool = False) -> str:
    """Write the weights of a classifier (ResNet, MobileNetV2) of torchvision or timm as a detector's backbone.

    Args:
        source: as in :func:`d2distill.detection.weights.read_detector`.
        out: ``.pth`` or ``.safetensors`` file for MODEL.WEIGHTS, of tensors ``backbone.bottom_up.*``.
        force: replace an existing file.

    Returns:
        A line that says what was written.

    Raises:
        CheckpointError: the source cannot be read, or is no such classifier's.
        ConfigError: as :func:`check_outputs`.
    """
    check_outputs([out], force)
    weights = read_detector(source)
    if weights.heuristic or weights.teacher or not all(name.startswith(BOTTOM_UP) for name in weights.state):
        some = ", ".join(list(weights.state)[:3])
        raise CheckpointError(f"{source} is of no ResNet or MobileNetV2 of torchvision or timm: it has {some}, ...")
    return write_detector(out, weights)


def copy_safely(source: str, out: str | Path, force: bool = False) -> str:
    """Write the weights of any file, such as a ``.pkl`` of Detectron2's zoo, to one that holds nothing but tensors.

    Arguments, result and errors as of :func:`convert_backbone`; the names stay, but for MobileNetV2's and
    classifiers', which become those of detectors here.
    """
    check_outputs([out], force)
    return write_detector(out, read_detector(source))


def merge(student: str, teacher: str, out: str | Path, force: bool = False) -> str:
    """Write one file of a student (its backbone may be all) and a trained teacher, as MDistiller's are.

    Args:
        student: as in :func:`.read_detector`; its names in `out` are plain, those of a ResNet with
            FPN if they are ImageNet weights of Detectron2's zoo.
        teacher: a trained detector; its names get the prefix ``teacher.``.
        out: ``.pth`` or ``.safetensors`` file.
        force: replace an existing file.

    Returns:
        A line that says what was written.

    Raises:
        CheckpointError: a source cannot be read, has a teacher already, or is no detector's.
        ConfigError: as :func:`check_outputs`.
    """
    check_outputs([out], force)
    ours, theirs = read_detector(student), read_detector(teacher)
    for weights in (ours, theirs):
        if weights.teacher:
            raise CheckpointError(f"{weights.source} has a teacher already: split it first")
    if theirs.heuristic or all(name.startswith(BOTTOM_UP) for name in theirs.state):
        raise CheckpointError(f"{teacher} is no detector with Detectron2's names, so it cannot be the teacher")
    state = of_fpn_backbone(ours.state, ours.author == CAFFE2) if ours.heuristic else ours.state
    if not state:
        raise CheckpointError(f"{student} is of no ResNet, so its names cannot be made a detector's")
    return write_detector(out, DetectorWeights(student, state, theirs.state, ours.author))


def split(merged: str, student_out: str | Path, teacher_out: str | Path, force: bool = False) -> list[str]:
    """Write the student and the teacher of a merged file to one file each.

    Returns:
        A line for each file that was written.

    Raises:
        CheckpointError: the source cannot be read, or has no student or no teacher.
        ConfigError: as :func:`check_outputs`, or both paths are one.
    """
    check_outputs([student_out, teacher_out], force)
    if Path(student_out).resolve() == Path(teacher_out).resolve():
        raise ConfigError(f"student and teacher would both be written to {student_out}")
    weights = read_detector(merged)
    both = {
        student_out: DetectorWeights(merged, weights.state, {}, weights.author),
        # The author is the student's: a classifier's backbone, say.
        teacher_out: DetectorWeights(merged, weights.teacher, {}),
    }
    for role, part in zip(("student", "teacher"), both.values(), strict=True):
        if not part.state:
            raise CheckpointError(f"{merged} has no {role}: it is no merged file")
    return [write_detector(path, part) for path, part in both.items()]


def _part(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"teacher's {rest.partition('.')[0]}" if first == "teacher" else first
