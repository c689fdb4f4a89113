"""Several classifiers over several seeds, side by side: runs, table, picture."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from d2distill.classification.config import load_cfg
from d2distill.common.engine.compare import Entry, mean_std, train_all
from d2distill.common.engine.writers import read_metrics

__all__ = ["Entry", "draw_curves", "run_all", "table"]

_COMMAND = Path(__file__).resolve().parent.parent / "tools" / "train_cls.py"


def run_all(entries: Sequence[Entry], output_dir: str | Path, processes: int, threads: int = 1) -> None:
    """Train every entry with every seed by ``tools/train_cls.py``; see :func:`.train_all`."""
    train_all(_COMMAND, entries, output_dir, processes, _planned_steps, threads)


def table(entries: Sequence[Entry], output_dir: str | Path) -> str:
    """Last and best top-1 (mean +- sample standard deviation over the seeds), parameters, FLOPs and time per run."""
    rows = []
    for entry in entries:
        runs = [json.loads((folder / "results.json").read_text()) for folder in entry.folders(output_dir)]
        rows.append(
            [
                entry.label,
                mean_std([run["top1"] for run in runs]),
                mean_std([run["best_top1"] for run in runs]),
                f"{runs[0]['parameters'] / 1e6:.3f} M",
                f"{runs[0]['flops'] / 1e6:.1f} M",
                f"{statistics.mean(run['seconds'] for run in runs):.0f} s",
                len(runs),
            ]
        )
    headers = ["", "last top-1 (%)", "best top-1 (%)", "parameters", "FLOPs", "time per run", "seeds"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def draw_curves(entries: Sequence[Entry], output_dir: str | Path, path: str | Path, title: str) -> None:
    """Test top-1 over epochs as a PNG: mean over the seeds, with a band from the lowest to the highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    lowest = []
    for entry in entries:
        curves = []
        for folder in entry.folders(output_dir):
            lines = [line for line in read_metrics(folder) if "top1" in line]
            epochs = [line["epoch"] for line in lines]
            curves.append([line["top1"] for line in lines])
        columns = list(zip(*curves, strict=True))
        means = [statistics.mean(values) for values in columns]
        (line,) = axes.plot(epochs, means, label=f"{entry.label}: {means[-1]:.1f}", linewidth=1.5)
        if len(curves) > 1:
            axes.fill_between(
                epochs, list(map(min, columns)), list(map(max, columns)), color=line.get_color(), alpha=0.2
            )
        lowest.append(statistics.median(means))
    # The first epochs, near chance, would press everything else against the upper edge.
    axes.set(xlabel="epoch", ylabel="test top-1 (%)", title=title, ylim=(max(0.0, 2 * min(lowest) - 100), 100))
    axes.grid(alpha=0.3)
    axes.legend(title="last epoch, mean over seeds", loc="lower right")
    figure.savefig(path)


def _planned_steps(entry: Entry) -> int:
    from d2distill.classification.trainer import load_datasets

    cfg = load_cfg(entry.config_file, entry.opts)
    train_set, _ = load_datasets(cfg)
    return cfg.SOLVER.EPOCHS * math.ceil(len(train_set) / cfg.SOLVER.IMS_PER_BATCH)
