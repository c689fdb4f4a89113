"""Several detectors over several seeds, side by side: runs and table."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from d2distill.common.engine.compare import Entry, mean_std, train_all
from d2distill.detection.config import load_cfg

__all__ = ["Entry", "results_of", "run_all", "table"]

_COMMAND = Path(__file__).resolve().parent / "train_net.py"
_METRICS = ("AP", "AP50", "AP75", "APs", "APm")


def run_all(entries: Sequence[Entry], output_dir: str | Path, processes: int, threads: int = 1) -> None:
    """Train every entry with every seed by ``detection/train_net.py``; see :func:`.train_all`."""
    train_all(_COMMAND, entries, output_dir, processes, _planned_steps, threads)


def results_of(entry: Entry, output_dir: str | Path) -> list[dict[str, Any]]:
    """What each seed's run left in results.json: ``bbox/AP`` etc. in percent, ``parameters``, ``seconds``."""
    return [json.loads((folder / "results.json").read_text()) for folder in entry.folders(output_dir)]


def table(entries: Sequence[Entry], output_dir: str | Path) -> str:
    """COCO's average precisions of boxes in percent (mean +- sample standard deviation over the seeds), parameters and
    time per run, evaluations included.

    AP is the last evaluation's; the best one's has a column where any run has another.
    """
    runs = {entry.label: results_of(entry, output_dir) for entry in entries}
    with_best = any(run["best_bbox/AP"] != run["bbox/AP"] for seeds in runs.values() for run in seeds)
    metrics = {name: f"bbox/{name}" for name in _METRICS}
    if with_best:
        metrics = {"AP": "bbox/AP", "best AP": "best_bbox/AP", **metrics}
    rows = [
        [
            label,
            *(mean_std([run[key] for run in seeds]) for key in metrics.values()),
            f"{seeds[0]['parameters'] / 1e6:.2f} M",
            f"{statistics.mean(run['seconds'] for run in seeds):.0f} s",
            len(seeds),
        ]
        for label, seeds in runs.items()
    ]
    headers = ["", *metrics, "parameters", "time per run", "seeds"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _planned_steps(entry: Entry) -> int:
    return load_cfg(entry.config_file, entry.opts).SOLVER.MAX_ITER
