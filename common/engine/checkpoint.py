"""Checkpoints of a run: the one place that writes them, and the one that resumes from them."""

import logging
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer
from torch import Tensor

from d2distill.common.engine.distributed import run_on_main_process
from d2distill.common.engine.weight_files import compare_states
from d2distill.common.errors import CheckpointError, DivergedError, OutputError, UserError

__all__ = ["RunCheckpointer", "assert_finite_tensors", "save_student", "write_atomically"]

logger = logging.getLogger("detectron2.d2distill")
_NAME = re.compile(r"model_(\d{7,})\.pth")


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let `write` fill a temporary file, then put it at `path`: a reader sees the old file or the whole new one.

    Raises:
        OutputError: the disk is full, or may not be written to.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save goes on where a write failed
        if not isinstance(cause, OSError):
            raise
        raise OutputError(
            f"{path} cannot be written: {cause.strerror or cause}; see to room and permission there, or choose another "
            "folder"
        ) from error
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
    """See that the floating tensors among the values are finite. Their device is waited for once.

    Raises:
        DivergedError: one holds an infinity or NaN.
    """
    checked = {name: t for name, t in tensors.items() if isinstance(t, Tensor) and t.is_floating_point()}
    finite = [value.isfinite().all() for value in checked.values()]
    if finite:
        flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()
        broken = [name for name, flag in zip(checked, flags, strict=True) if not flag]
        if broken:
            others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            raise DivergedError(f"{broken[0]}{others} became infinite or NaN.")


def save_student(path: str | Path, state_dict: dict[str, Tensor]) -> None:
    """Write a network alone, as ``{"model": state_dict}``: the form in which such checkpoints are published.

    Raises:
        DivergedError: its weights are not finite.
    """
    assert_finite_tensors(state_dict)
    write_atomically(path, lambda file: torch.save({"model": state_dict}, file))


class RunCheckpointer(Checkpointer):
    """fvcore's Checkpointer whose writes are atomic and whose reads run no code from the file.

    Files are ``model_<steps done>.pth`` in the run folder; the newest `keep` of them are kept.
    """

    def __init__(self, model: torch.nn.Module, save_dir: str, *, keep: int = 2, **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.keep = keep

    def save(self, name: str, **kwargs: Any) -> None:
        """Write the model, every checkpointable and `kwargs` to ``<name>.pth``, then drop the oldest files."""
        states = {key: item.state_dict() for key, item in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **states, **kwargs}
        path = Path(self.save_dir, f"{name}.pth")
        write_atomically(path, lambda file: torch.save(data, file))
        write_atomically(path.with_name("last_checkpoint"), lambda file: file.write(path.name.encode()))
        for old in self.files()[self.keep :]:
            old.unlink()

    def files(self) -> list[Path]:
        """Checkpoints of the run folder, newest first."""
        found = [p for p in Path(self.save_dir).glob("model_*.pth") if _NAME.fullmatch(p.name)]
        return sorted(found, key=lambda p: int(_NAME.fullmatch(p.name)[1]), reverse=True)

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """Read the latest valid checkpoint, which the main process chooses for all; all call it.

        A damaged one is skipped with a warning.

        Returns:
            The file and what it holds, or None if there is no checkpoint.

        Raises:
            CheckpointError: in all processes, where every checkpoint is damaged, the file is not of such a run, or a
                process cannot read the one that the main process chose.
        """
        found: list[tuple[Path, dict[str, Any]]] = []
        run_on_main_process(lambda: found.extend(self._latest_valid()))
        name = comm.all_gather(found[0][0].name if found else None)[0]
        if name is None:
            return None
        error = None
        if not comm.is_main_process():
            path = Path(self.save_dir, name)
            try:
                found = [(path, self._load_file(str(path)))]
            except CheckpointError as own:
                error = f"rank {comm.get_rank()} cannot follow: {own}. OUTPUT_DIR must be one folder for all nodes"
        if errors := [text for text in comm.all_gather(error) if text]:
            raise CheckpointError(f"the job resumes from {name}, but {errors[0]}")
        return found[0]

    def _latest_valid(self) -> list[tuple[Path, dict[str, Any]]]:
        for stale in Path(self.save_dir).glob("*.tmp"):
            stale.unlink(missing_ok=True)  # of a save that was killed
        files = self.files()
        for path in files:
            try:
                data = self._load_file(str(path))
            except CheckpointError as error:
                logger.warning(f"{error}; trying the checkpoint before it")
                continue
            needed = ("model", *self.checkpointables, "settings", "run_identity")
            absent = [key for key in needed if not isinstance(data, dict) or key not in data]
            if absent:
                raise CheckpointError(
                    f"{path} is no checkpoint of such a run: it has no '{absent[0]}'. Move it out of the folder, or "
                    "choose another OUTPUT_DIR"
                )
            return [(path, data)]
        if files:
            raise CheckpointError(f"none of the {len(files)} checkpoints in {self.save_dir} can be read")
        return []

    def restore(self, path: Path, data: dict[str, Any]) -> None:
        """Load what :meth:`latest` read into the model and the checkpointables.

        Raises:
            CheckpointError: it is of another model or optimizer.
            UserError: whatever else a checkpointable objects to.
        """
        logger.info(f"Resuming from {path}")
        try:
            differing = self._load_model(data["model"])
            if differing:
                raise CheckpointError(f"{path} is of another model: {differing}; choose another OUTPUT_DIR")
            for key, item in self.checkpointables.items():
                item.load_state_dict(data[key])
        except UserError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CheckpointError(
                f"{path} does not fit this run ({reason}): resume with the settings that it was made with, or choose "
                "another OUTPUT_DIR"
            ) from error

    def _load_file(self, f: str) -> dict[str, Any]:
        try:
            # torch.load does not check the archive's checksums: flipped bits would become weights.
            with zipfile.ZipFile(f) as archive:
                damaged = archive.testzip()
            if damaged:
                raise CheckpointError(f"{f} is damaged: wrong checksum of {damaged}")
            return torch.load(f, map_location="cpu", weights_only=True)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, UnpicklingError) as error:
            if isinstance(error, CheckpointError):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{f} is damaged: {reason}") from error

    def _load_model(self, weights: dict[str, Tensor]) -> str:
        found = compare_states(self.model.state_dict(), weights)
        if not any(found):
            self.model.load_state_dict(weights)
        return str(found)
