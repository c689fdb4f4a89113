"""Run folders as figures see them: settings, logged numbers, results, and what to call them."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from d2distill.common.engine.run_folder import RESULTS
from d2distill.common.engine.settings import flat_settings
from d2distill.common.engine.writers import METRICS, read_metrics
from d2distill.common.errors import DataError

__all__ = ["Run", "best_metric", "group_by_seed", "read_run", "read_runs", "run_label", "unique_labels"]


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        settings: of its config.yaml, as ``{"NODE.KEY": value}``.
        lines: of its metrics.json.
        results: of its results.json; empty where it has not ended.
    """

    folder: Path
    settings: dict[str, Any]
    lines: list[dict[str, float]]
    results: dict[str, Any]

    @property
    def task(self) -> str:
        return "classification" if "MODEL.STUDENT.NAME" in self.settings else "detection"


def read_run(path: str | Path) -> Run:
    """The run of a folder, or of a file in it.

    Raises:
        DataError: it has no metrics.json with numbers, or no config.yaml.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not Path(path).exists():
        raise DataError(f"{path}: no such run folder")
    lines = read_metrics(folder)
    if not lines:
        raise DataError(f"{folder} has no {METRICS} with numbers: name the folder of a run (its OUTPUT_DIR)")
    settings, results = run_settings(folder), folder / RESULTS
    if not settings:
        raise DataError(f"{folder} has no config.yaml: name the folder of a run (its OUTPUT_DIR)")
    return Run(folder, settings, lines, json.loads(results.read_text()) if results.is_file() else {})


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs of one task, each once.

    Raises:
        DataError: as :func:`read_run`; or runs of both tasks.
    """
    runs = list({run.folder.resolve(): run for run in map(read_run, paths)}.values())
    if len({run.task for run in runs}) > 1:
        other = next(run for run in runs if run.task != runs[0].task)
        raise DataError(f"{runs[0].folder} is a run of {runs[0].task}, {other.folder} of {other.task}: draw them apart")
    return runs


def run_settings(folder: str | Path) -> dict[str, Any]:
    """The settings of a run folder as ``{"NODE.KEY": value}``; empty where it has no config.yaml."""
    file = Path(folder, "config.yaml")
    return flat_settings(CfgNode(yaml.safe_load(file.read_text()))) if file.is_file() else {}


def run_label(settings: dict[str, Any], folder: Path) -> str:
    """What trained what: ``resnet8, KD from vgg8``; of a detector ``FOLDER, KD``, without its seed."""
    methods = " + ".join(settings.get("DISTILL.METHODS", ()))
    if "MODEL.STUDENT.NAME" not in settings:
        return ", ".join(filter(None, [re.sub(r"_seed\d+$", "", folder.resolve().name), methods]))
    teacher = settings["MODEL.TEACHER.NAME"]
    teacher = teacher if isinstance(teacher, str) else " + ".join(teacher)
    how = [f"{methods} from {teacher}" if teacher else methods] if methods else []
    return ", ".join([settings["MODEL.STUDENT.NAME"], *how])


def unique_labels(labels: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The labels; where several are the same with their folders, or these alone if they begin with the label."""
    names = [folder.resolve().name for folder in folders]
    places = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    return [
        label if labels.count(label) == 1 else place if place.startswith(label) else f"{label} ({place})"
        for label, place in zip(labels, places, strict=True)
    ]


def group_by_seed(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs whose settings differ in SEED alone, together, in the order of the first of each."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        others = {key: value for key, value in run.settings.items() if key not in ("SEED", "OUTPUT_DIR")}
        groups.setdefault(json.dumps(others, sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def best_metric(runs: Sequence[Run]) -> str:
    """The metric by which the runs tell their best student; empty where none was evaluated yet."""
    # Of each metric the log has the best value as well.
    found = {key: None for run in runs for line in run.lines for key in line if f"best_{key}" in line}
    usual = [key for key in found if key in ("top1", "mAP") or key.endswith("bbox/AP")]
    return next(iter([*usual, *found]), "")
