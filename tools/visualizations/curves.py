"""Learning curves of runs: their metric on the test images, losses and learning rate."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from d2distill.tools.visualizations.runs import Run, best_metric, group_by_seed, read_runs, run_label, unique_labels
from d2distill.tools.visualizations.style import COLORS, grid, styled

__all__ = ["curves_figure", "mean_curve", "teacher_values"]


@styled
def curves_figure(folders: Sequence[str | Path]) -> Figure:
    """Metric, losses and learning rate of runs of one task over epochs, or over iterations where there are no epochs.

    Runs that differ in their seed alone are one line, their mean, in a band from the lowest to the highest. The
    teachers' own metric, measured at the start of the runs, is a horizontal line.

    Raises:
        DataError: a folder without metrics.json or config.yaml, or runs of both tasks.
    """
    runs = read_runs(folders)
    groups, metric = group_by_seed(runs), best_metric(runs)
    firsts = [group[0] for group in groups]
    labels = unique_labels([run_label(run.settings, run.folder) for run in firsts], [run.folder for run in firsts])
    losses = {key: None for run in runs for line in run.lines for key in line if key.startswith("loss_")}
    shown = {"top1": "top-1"}.get(metric, metric.replace("bbox/", "box "))
    known = {key for run in runs for line in run.lines for key in line}
    panels = {metric: f"test {shown} (%)"} if metric else {}
    panels |= {"total_loss": "total loss, training"} if len(losses) > 1 else {}
    panels |= {key: f"{key}, training" for key in losses}
    others = {"test_loss": "test loss", f"train_{metric}": f"training {shown} (%)", "lr": "learning rate"}
    panels |= {key: label for key, label in others.items() if key in known}
    seeds = any(len(group) > 1 for group in groups)
    title = f"Learning curves on {', '.join(dict.fromkeys(map(data_name, runs)))}"
    title += "\nmean over the seeds, band from the lowest to the highest" if seeds else ""
    figure, all_axes = grid(title, len(panels), 3.4, wide=True)
    unit = "epoch" if runs[0].task == "classification" else "iteration"
    for axes, (key, label) in zip(all_axes, panels.items(), strict=True):
        lowest, highest = [], []
        for number, group in enumerate(groups):
            x, mean, low, high = mean_curve(group, key, unit)
            if not len(x):
                continue
            color, style = COLORS[number % len(COLORS)], ("-", "--", ":", "-.")[number // len(COLORS) % 4]
            name = f"{labels[number]}{f' ({len(group)} seeds)' if len(group) > 1 else ''}"
            if key == metric:
                name += f": {mean[-1]:.1f} at the end"
            axes.plot(x, mean, color=color, linestyle=style, label=name, marker="o" if len(x) == 1 else None)
            if len(group) > 1:
                axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            lowest.append(np.nanmin(low))
            highest.append(np.nanmax(high))
        if key == metric:
            for number, (teacher, value) in enumerate(teacher_values(runs, metric).items()):
                style = ("--", ":", "-.")[number % 3]
                axes.axhline(value, color="black", linestyle=style, label=f"{teacher}: {value:.1f}")
        elif min(lowest) > 0 and max(highest) > 50 * min(lowest):
            axes.set_yscale("log")
        axes.set(xlabel=unit, ylabel=label, xlim=(0, None))
        axes.grid(True)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def mean_curve(runs: Sequence[Run], key: str, unit: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Epochs or iterations at which all runs have a number; the mean, the lowest and the highest of the runs there."""
    curves = [
        {line["epoch"] if unit == "epoch" else line["iteration"] + 1: line[key] for line in run.lines if key in line}
        for run in runs
    ]
    x = sorted(set.intersection(*map(set, curves)))
    values = np.array([[curve[at] for at in x] for curve in curves], dtype=float)
    return np.array(x), values.mean(0), values.min(0), values.max(0)


def teacher_values(runs: Sequence[Run], metric: str) -> dict[str, float]:
    """The teachers' own metric in results.json, by what to call them; each value once."""
    found: dict[tuple[str, float], None] = {}
    for run in runs:
        names = run.settings.get("MODEL.TEACHER.NAME") or Path(run.settings.get("TEACHER.CONFIG_FILE", "")).stem
        names = [names] if isinstance(names, str) else names
        keys = {f"teacher_{metric}": names[0]} | {f"teacher_{i}_{metric}": name for i, name in enumerate(names)}
        found |= {
            (f"teacher {n}", run.results[key]): None for key, n in keys.items() if run.results.get(key) is not None
        }
    counts = [name for name, _ in found]
    return {name if counts.count(name) == 1 else f"{name} ({value:.2f})": value for name, value in found}


def data_name(run: Run) -> str:
    """What the run is tested on."""
    return run.settings.get("DATASETS.NAME") or ", ".join(run.settings["DATASETS.TEST"])
