"""A trained student in one line, with its class names and its preprocessing."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from d2distill.common.errors import CheckpointError, require_detectron2

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load", "student_file"]


def load(path: str | Path, device: str = "cpu") -> "nn.Module":
    """The student of a run, ready for use.

    Args:
        path: a run folder, of which the best student is taken, or else the final one; a ``student_*.pth`` file; or a
            file of ``d2distill-export``.

    Returns:
        A module in eval mode with ``classes``, ``preprocess`` and ``description``. It is a
        :class:`~d2distill.classification.deployed.DeployedClassifier`, which turns a batch of preprocessed images into
        logits, or a :class:`~d2distill.detection.deployed.DeployedDetector`, which turns a list of preprocessed images
        into Detectron2's results. Of an exported program an
        :class:`~d2distill.classification.deployed.ExportedClassifier` or
        :class:`~d2distill.detection.deployed.ExportedDetector`, used alike.

    Raises:
        CheckpointError: there is no student, or it is damaged, or its file says nothing of its network.
    """
    require_detectron2()
    from d2distill.common.engine.weight_files import read_description, read_weights
    from d2distill.exported import SUFFIXES, open_program

    if Path(path).suffix in SUFFIXES:
        program, description = open_program(Path(path), device)
        deployed = import_module(f"d2distill.{description['task']}.deployed")
        try:
            return deployed.load_program(program, description)
        except Exception as error:  # a description may say anything
            raise CheckpointError(f"{path} describes itself wrongly: {str(error) or type(error).__name__}") from error
    file = str(student_file(path))
    weights, description = read_weights(file), read_description(file)
    task = description.get("task")
    if task not in ("classification", "detection"):
        raise CheckpointError(
            f"{file} holds weights, but no description of its network: it is not the student of a run of d2distill, or "
            "of a version before 0.3; build the network by name and load the weights"
        )
    return import_module(f"d2distill.{task}.deployed").load_student_file(file, weights, description).to(device)


def student_file(path: str | Path) -> Path:
    """`path` itself, or the student to take of a run folder."""
    if Path(path).suffix and not Path(path).is_dir():
        return Path(path)
    for name in ("student_best.pth", "student_final.pth"):
        if Path(path, name).is_file():
            return Path(path, name)
    raise CheckpointError(
        f"{path} has no student_best.pth or student_final.pth: name a checkpoint, or the folder of a run that has been "
        "evaluated at least once"
    )
