"""Loggers outside of the run folder, and its CSV: the libraries' own, as Detectron2's event writers."""

import csv
import json
import logging
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from detectron2.utils.events import EventWriter, get_event_storage

from d2distill.common.engine.run_folder import read_metrics, write_text

__all__ = ["CSVWriter", "GuardedWriter", "MLflowWriter", "WandbWriter", "current_scalars"]

logger = logging.getLogger("detectron2.d2distill")
#: In the run folder: by which ids the services know the run.
RUN_IDS = "logger_ids.json"


def current_scalars() -> dict[str, float]:
    """What was put into the event storage in the present step; times are medians over the last 20 steps."""
    storage = get_event_storage()
    scalars = storage.latest_with_smoothing_hint()
    return {name: value for name, (value, step) in scalars.items() if step == storage.iter}


class CSVWriter(EventWriter):
    """``metrics.csv``: a row for each line of metrics.json, a column for each of its keys, for spreadsheets.

    A column that comes later, such as the first evaluation's, is added by writing the file anew from metrics.json, so
    that what a resumed run repeats is there once.
    """

    def __init__(self, folder: str) -> None:
        self._folder, self._path, self._columns = folder, Path(folder, "metrics.csv"), []

    def write(self) -> None:
        row = {"iteration": get_event_storage().iter, **current_scalars()}
        if not row.keys() <= set(self._columns):
            rows, mode = read_metrics(self._folder), "w"  # its writer comes first: the last line is this row
            self._columns = list(dict.fromkeys(["iteration", *sorted({name for line in rows for name in line})]))
        else:
            rows, mode = [row], "a"
        with open(self._path, mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)


class WandbWriter(EventWriter):
    """A Weights & Biases run with the name of the run folder; a resumed run continues it.

    WANDB_PROJECT, WANDB_MODE and the library's other environment variables apply.
    """

    def __init__(self, folder: str, settings: Mapping[str, Any], resumed: bool) -> None:
        import wandb

        run_id = (_known_id(folder, "wandb") if resumed else None) or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            name=Path(folder).name,
            dir=folder,
            config=dict(settings),
            allow_val_change=True,  # settings may be others when a run is resumed
        )
        _keep_id(folder, "wandb", run_id)

    def write(self) -> None:
        step = get_event_storage().iter
        # Steps that a resumed run repeats are there already, with the same values.
        if step >= self._run.step:
            self._run.log(current_scalars(), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflowWriter(EventWriter):
    """An MLflow run with the name of the run folder; a resumed run continues it.

    MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and the library's other environment variables apply.
    """

    def __init__(self, folder: str, settings: Mapping[str, Any], resumed: bool) -> None:
        import mlflow

        self._mlflow, known = mlflow, _known_id(folder, "mlflow") if resumed else None
        run = mlflow.start_run(run_id=known, run_name=None if known else Path(folder).name)
        self._logged = -1
        if known:
            history = mlflow.MlflowClient().get_metric_history(known, "lr")
            self._logged = max((point.step for point in history), default=-1)
        else:  # MLflow's parameters stay as they were first given
            parameters = list(settings.items())
            for first in range(0, len(parameters), 100):  # the most that it takes at once
                mlflow.log_params(dict(parameters[first : first + 100]))
        _keep_id(folder, "mlflow", run.info.run_id)

    def write(self) -> None:
        step = get_event_storage().iter
        if step > self._logged:  # others are repeated by a resumed run
            self._mlflow.log_metrics(current_scalars(), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class GuardedWriter(EventWriter):
    """A writer whose failures end its log, with one warning, and not the training: no library, no network.

    Args:
        name: of the entry of LOGGERS, and of the extra that installs its library.
        build: makes the writer.
    """

    def __init__(self, name: str, build: Callable[[], EventWriter]) -> None:
        self._name, self._writer = name, None
        self._writer = self._guard(build)

    def write(self) -> None:
        if self._writer is not None:
            self._guard(self._writer.write)

    def close(self) -> None:
        if self._writer is not None:
            self._guard(self._writer.close)

    def _guard(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # of a library, or of its connection: anything
            self._writer = None
            reason = (str(error) or type(error).__name__).splitlines()[0]
            absent = isinstance(error, ModuleNotFoundError)
            hint = f": pip install 'd2distill[{self._name}]'" if absent else ""
            logger.warning(f"LOGGERS {self._name} is switched off ({reason}){hint}; the run continues without it")
            return None


def _known_id(folder: str, name: str) -> str | None:
    path = Path(folder, RUN_IDS)
    return json.loads(path.read_text()).get(name) if path.is_file() else None


def _keep_id(folder: str, name: str, run_id: str) -> None:
    path = Path(folder, RUN_IDS)
    known = json.loads(path.read_text()) if path.is_file() else {}
    write_text(path, json.dumps({**known, name: run_id}))
