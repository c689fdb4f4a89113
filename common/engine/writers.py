"""Log writers of a run folder, on Detectron2's, that continue a log from the step at which a run is resumed."""

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter, get_event_storage

from d2distill.common.engine.checkpoint import write_atomically
from d2distill.common.engine.loggers import CSVWriter, GuardedWriter, MLflowWriter, WandbWriter, current_scalars
from d2distill.common.engine.run_folder import METRICS, read_metrics

#: The logger of the lines with losses, which Detectron2's own have as well.
STEP_LINES = "detectron2.utils.events"


def build_writers(
    output_dir: str,
    start_iter: int,
    max_iter: int,
    loggers: Sequence[str] = ("tensorboard",),
    settings: Mapping[str, Any] | None = None,
    epoch_length: int = 0,
) -> list[EventWriter]:
    """log.txt, metrics.json and LOGGERS; what they hold of steps that are repeated is dropped first.

    Args:
        start_iter: steps that are done already; the line of the last of them is written anew.
        settings: of the run, for loggers that keep them.
        epoch_length: in steps; 0 where there are no epochs.
    """
    path, resumed, first = Path(output_dir, METRICS), start_iter > 0, max(start_iter - 1, 0)
    drop_lines_from(path, first)
    writers = [StepLineWriter(max_iter, epoch_length), JSONWriter(str(path))]
    if "tensorboard" in loggers:
        writers.append(TensorBoardWriter(output_dir, purge_step=first or None))
    if "csv" in loggers:
        writers.append(CSVWriter(output_dir))
    for name, kind in (("wandb", WandbWriter), ("mlflow", MLflowWriter)):
        if name in loggers:
            writers.append(GuardedWriter(name, lambda kind=kind: kind(output_dir, settings or {}, resumed)))
    return writers


class TensorBoardWriter(TensorboardXWriter):
    """Detectron2's, which raises here what its thread could not write: with the next line it would, or never.

    The file is made at once: its making would make a removed folder too.
    """

    def __init__(self, folder: str, **options: Any) -> None:
        if not isinstance(threading.excepthook, _ThreadErrors):
            threading.excepthook = _ThreadErrors(threading.excepthook)
        super().__init__(folder, **options)
        self._writer.flush()

    def write(self) -> None:
        super().write()
        self._writer.flush()


@dataclass
class _ThreadErrors:
    """A threading.excepthook without tracebacks of TensorBoard's thread."""

    others: Callable[[Any], Any]

    def __call__(self, error: Any) -> None:
        if not type(error.thread).__module__.startswith("tensorboard."):
            self.others(error)


class StepLineWriter(EventWriter):
    """A line in the log as Detectron2's CommonMetricPrinter writes it, with the epoch, and means since the last one."""

    def __init__(self, max_iter: int, epoch_length: int = 0) -> None:
        self._epochs = max_iter / epoch_length if epoch_length else 0
        self._logger = logging.getLogger(STEP_LINES)

    def write(self) -> None:
        scalars, parts = current_scalars(), {}
        if "eta_seconds" in scalars:
            parts["eta"] = timedelta(seconds=int(scalars["eta_seconds"]))
        if self._epochs:
            parts["epoch"] = f"{scalars['epoch']:.4g}/{self._epochs:.4g}"
        parts["iter"] = get_event_storage().iter
        of_training = [name for name in scalars if ("loss" in name and "test_loss" not in name) or name == "train_top1"]
        parts |= {name: f"{scalars[name]:.4g}" for name in of_training}
        named = {"time": "time", "data_time": "data_time", "images_per_second": "images/s", "lr": "lr"}
        parts |= {label: f"{scalars[name]:.4g}" for name, label in named.items() if name in scalars}
        if "max_mem" in scalars:
            parts["max_mem"] = f"{scalars['max_mem']:.0f}M"
        self._logger.info(" " + "  ".join(f"{name}: {value}" for name, value in parts.items()))


def drop_lines_from(path: Path, step: int) -> None:
    """Remove the lines of steps at or after `step`, and what a kill left behind the last whole one."""
    if path.exists():
        lines = [line for line in read_metrics(path.parent) if line["iteration"] < step]
        kept = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
        if kept.encode() != path.read_bytes():
            write_atomically(path, lambda file: file.write(kept.encode()))
