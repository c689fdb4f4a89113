"""Convert files of weights into forms that stock Detectron2 loads too, and that hold nothing but tensors."""

import re
from dataclasses import replace
from pathlib import Path

from d2distill.common.engine.checkpoint import write_atomically
from d2distill.common.engine.tensor_files import write_safetensors, write_torch_file
from d2distill.common.errors import CheckpointError, ConfigError
from d2distill.detection.weight_names import BOTTOM_UP
from d2distill.detection.weights import DetectorWeights, read_detector

__all__ = ["convert_to_tensors", "merge", "split", "write_detector"]


def convert_to_tensors(source: str, out: str | Path, force: bool = False) -> str:
    """Write the weights of any `source` of :func:`.read_detector` as tensors by Detectron2's names.

    For a ``.pkl`` of Detectron2's zoo, or a classifier of torchvision or timm, which becomes a detector's backbone.

    Args:
        out: ``.pth`` or ``.safetensors`` file.
        force: replace an existing file.

    Returns:
        A line that tells what was written.

    Raises:
        CheckpointError: the source cannot be read.
        ConfigError: `out` has another suffix, is in no folder, or exists without `force`.
    """
    _check_outputs([out], force)
    return write_detector(out, read_detector(source))


def merge(student: str, teacher: str, out: str | Path, force: bool = False) -> str:
    """Write a student and a trained teacher to one file, as MDistiller does; result and errors as above.

    Args:
        student: a detector or its backbone. ImageNet weights of Detectron2's zoo get the names of a ResNet with FPN.
        teacher: a trained detector; its names get the prefix ``teacher.``.
    """
    _check_outputs([out], force)
    ours, theirs = read_detector(student), read_detector(teacher)
    for weights in (ours, theirs):
        if weights.teacher:
            raise CheckpointError(f"{weights.source} has a teacher already: split it first")
    if theirs.matching_heuristics or all(name.startswith(BOTTOM_UP) for name in theirs.state):
        raise CheckpointError(f"{teacher} cannot be the teacher: it is not a detector with Detectron2's names")
    state = ours.state
    if ours.matching_heuristics:
        state = {BOTTOM_UP + n: value for n, value in state.items() if re.match(r"stem\.conv|res[2-5]\.", n)}
        if not state:
            raise CheckpointError(f"{student} cannot be the student: its names are neither a ResNet's nor a detector's")
    return write_detector(out, DetectorWeights(student, state, theirs.state, ours.author))


def split(merged: str, student_out: str | Path, teacher_out: str | Path, force: bool = False) -> list[str]:
    """Write the student and the teacher of a merged file to one file each; results and errors as above."""
    _check_outputs([student_out, teacher_out], force)
    weights = read_detector(merged)
    if not (weights.state and weights.teacher):
        raise CheckpointError(f"{merged} has no {'teacher' if weights.state else 'student'}: it is not a merged file")
    # The author is the student's.
    teacher = DetectorWeights(merged, weights.teacher, {})
    return [write_detector(student_out, replace(weights, teacher={})), write_detector(teacher_out, teacher)]


def write_detector(path: str | Path, weights: DetectorWeights) -> str:
    """Write `weights` to a ``.pth`` or ``.safetensors`` file atomically, the teacher's as ``teacher.*``."""
    teacher = {f"teacher.{name}": value for name, value in weights.teacher.items()}
    # A view would be saved with the whole tensor behind it.
    state = {name: value.detach().clone().contiguous() for name, value in {**weights.state, **teacher}.items()}
    facts = {"__author__": weights.author, **({"matching_heuristics": True} if weights.matching_heuristics else {})}
    if Path(path).suffix == ".safetensors":
        texts = {name: str(value) for name, value in facts.items()}
        write_atomically(path, lambda file: write_safetensors(state, texts, file))
    else:
        write_atomically(path, lambda file: write_torch_file({"model": state, **facts}, file))
    parts = sorted({re.sub(r"^(teacher\.)?(\w+)\..*", r"\1\2", name) for name in state})
    return f"wrote {path}: {len(state)} tensors ({', '.join(parts)})"


def _check_outputs(paths: list[str | Path], force: bool) -> None:
    """Check before the work that `paths` can be written."""
    for path in map(Path, paths):
        if path.suffix not in (".pth", ".safetensors"):
            raise ConfigError(f"{path} must end with .pth or .safetensors")
        if not path.parent.is_dir():
            raise ConfigError(f"there is no folder {path.parent.absolute()}")
        if path.exists() and not force:
            raise ConfigError(f"{path} exists; --force replaces it")
