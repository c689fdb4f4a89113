"""Checkpoints of a run: the one place that writes them, and the one that resumes from them."""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.utils import comm
from torch import Tensor

from d2distill.common.engine.distributed import run_on_main_process
from d2distill.common.engine.folder_lock import check_folder
from d2distill.common.engine.weight_files import DESCRIPTION, compare_states, read_torch
from d2distill.common.errors import CheckpointError, DivergedError, writing

logger = logging.getLogger("detectron2.d2distill")
_NAME = re.compile(r"model_(\d{7,})\.pth")


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file, then put it at `path`: a reader sees the old file or the whole new one.

    Raises:
        OutputError: the disk is full, or may not be written to, or the run folder is no longer this run's.
    """
    path = Path(path)
    check_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        # The rename itself must reach the disk too.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def assert_finite_tensors(tensors: Mapping[str, Any]) -> None:
    """Raise a DivergedError where a floating tensor among the values is not finite. Waits for their device once."""
    finite = {n: t.isfinite().all() for n, t in tensors.items() if isinstance(t, Tensor) and t.is_floating_point()}
    if finite:
        device = next(iter(finite.values())).device
        flags = torch.stack([flag.to(device) for flag in finite.values()]).tolist()
        if not all(flags):
            others = f" and {flags.count(False) - 1} more" if flags.count(False) > 1 else ""
            raise DivergedError(f"{list(finite)[flags.index(False)]}{others} became infinite or NaN.")


def save_student(path: str | Path, state_dict: dict[str, Tensor], description: Mapping[str, Any] | None = None) -> None:
    """Write a finite network alone, as ``{"model": state_dict}``, the form in which checkpoints are published.

    A `description` of what is needed to use it goes beside it, as JSON.
    """
    assert_finite_tensors(state_dict)
    content = {"model": state_dict} | ({DESCRIPTION: json.dumps(description)} if description else {})
    write_atomically(path, lambda file: torch.save(content, file))


class RunCheckpointer:
    """Checkpoints ``model_<steps done>.pth`` of a run folder: written atomically, read without running code from them.

    fvcore's Checkpointer does neither. Its file ``last_checkpoint`` is written as well.

    Args:
        model, checkpointables: what is saved and restored, by ``state_dict()`` and ``load_state_dict()``.
        save_dir: the run folder.
        keep: so many of the newest files stay.
    """

    def __init__(self, model: torch.nn.Module, save_dir: str, *, keep: int = 2, **checkpointables: Any) -> None:
        self.model, self.save_dir, self.keep, self.checkpointables = model, Path(save_dir), keep, checkpointables

    def save(self, name: str, **kwargs: Any) -> None:
        """Write the model, every checkpointable and `kwargs` to ``<name>.pth``, then drop the oldest files."""
        states = {key: item.state_dict() for key, item in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **states, **kwargs}
        write_atomically(self.save_dir / f"{name}.pth", lambda file: torch.save(data, file))
        write_atomically(self.save_dir / "last_checkpoint", lambda file: file.write(f"{name}.pth".encode()))
        for old in self.files()[self.keep :]:
            with writing(old, "removed"):
                old.unlink(missing_ok=True)

    def files(self) -> list[Path]:
        """Checkpoints of the run folder, newest first."""
        found = [path for path in self.save_dir.glob("model_*.pth") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]), reverse=True)

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The latest valid checkpoint and what it holds, None if there is none. The main process chooses it for all.

        A damaged one is skipped with a warning. All call it.

        Raises:
            CheckpointError: in all processes, where none can be read, or one process cannot read the chosen one.
        """
        name = run_on_main_process(self._latest_valid)
        if name is None:
            return None
        path, data, error = self.save_dir / name, None, None
        try:
            data = self._read(path)
        except CheckpointError as own:
            error = f"rank {comm.get_rank()} cannot follow: {own}. OUTPUT_DIR must be one folder for all nodes"
        if errors := [text for text in comm.all_gather(error) if text]:
            raise CheckpointError(f"the job resumes from {name}, but {errors[0]}")
        return path, data

    def _latest_valid(self) -> str | None:
        errors = []
        for path in self.files():
            try:
                self._read(path)
                return path.name
            except CheckpointError as error:
                logger.warning(f"{error}; trying the checkpoint before it")
                errors.append(error)
        if errors:
            raise CheckpointError(f"none of the {len(errors)} checkpoints in {self.save_dir} can be read: {errors[0]}")
        return None

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            data = read_torch(path)
        except Exception as error:  # a damaged file raises nearly anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path} is damaged: {reason}") from error
        for key in ("model", *self.checkpointables, "settings", "run_identity"):
            if key not in data:
                raise CheckpointError(f"{path} is no checkpoint of such a run: it has no '{key}'")
        return data

    def restore(self, path: Path, data: dict[str, Any]) -> None:
        """Load what :meth:`latest` read into the model and the checkpointables."""
        logger.info(f"Resuming from {path}")
        differing = compare_states(self.model.state_dict(), data["model"])
        if any(differing):
            raise CheckpointError(f"{path} is of another model: {differing}; choose another OUTPUT_DIR")
        self.model.load_state_dict(data["model"])
        for key, item in self.checkpointables.items():
            item.load_state_dict(data[key])
