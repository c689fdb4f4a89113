"""Several configurations over several seeds, side by side: runs, table, picture."""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from classification.config import load_cfg
from common.engine.writers import read_metrics
from common.errors import UserError

__all__ = ["Entry", "draw_curves", "run_all", "table"]

_COMMAND = Path(__file__).resolve().parent.parent / "tools" / "train_cls.py"


@dataclass
class Entry:
    """One row of the comparison.

    Attributes:
        label: how it is called in table and picture.
        config_file: a configuration of ``tools/train_cls.py``.
        seeds: one run each.
        opts: further settings, as KEY VALUE pairs.
    """

    label: str
    config_file: str
    seeds: Sequence[int]
    opts: list[str] = field(default_factory=list)

    def folders(self, output_dir: str | Path) -> list[Path]:
        """The run folder of each seed."""
        return [Path(output_dir, f"{Path(self.config_file).stem}_seed{seed}") for seed in self.seeds]


def run_all(entries: Sequence[Entry], output_dir: str | Path, processes: int, threads: int = 1) -> None:
    """Train every entry with every seed, `processes` runs at a time, and show one line of progress.

    Each run is the command a user would type, in a process of its own, and goes on where an earlier call stopped.

    Args:
        threads: CPU threads of each run. Its last digits may depend on them, so they are not left to the machine.

    Raises:
        UserError: a run failed; the message ends with the last lines of its log.
    """
    jobs = [(entry, seed, folder) for e in entries for entry, seed, folder in _jobs(e, output_dir)]
    steps = {folder: _planned_steps(entry) for entry, _, folder in jobs}
    waiting, running, progress = list(jobs), {}, _Progress()
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                entry, seed, folder = waiting.pop(0)
                running[folder] = _start(entry, seed, folder, threads)
            time.sleep(0.2)
            for folder, process in list(running.items()):
                if process.poll() is not None:
                    del running[folder]
                    if process.returncode:
                        lines = (folder / "console.txt").read_text().splitlines()[-8:]
                        raise UserError(f"the run in {folder} failed:\n" + "\n".join(lines))
            finished = len(jobs) - len(waiting) - len(running)
            done = sum(_done_steps(folder) for folder in steps)
            progress.show(f"{finished}/{len(jobs)} runs", done, sum(steps.values()), last=finished == len(jobs))
    finally:
        for process in running.values():
            process.terminate()
        print(file=sys.stderr)


def table(entries: Sequence[Entry], output_dir: str | Path) -> str:
    """Last and best top-1 (mean +- sample standard deviation over the seeds), parameters, FLOPs and time per run."""
    rows = []
    for entry in entries:
        runs = [json.loads((folder / "results.json").read_text()) for folder in entry.folders(output_dir)]
        rows.append(
            [
                entry.label,
                _mean_std([run["top1"] for run in runs]),
                _mean_std([run["best_top1"] for run in runs]),
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


def _jobs(entry: Entry, output_dir: str | Path) -> list[tuple[Entry, int, Path]]:
    return [(entry, seed, folder) for seed, folder in zip(entry.seeds, entry.folders(output_dir), strict=True)]


def _start(entry: Entry, seed: int, folder: Path, threads: int) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    settings = ["SEED", str(seed), "OUTPUT_DIR", str(folder), *entry.opts]
    command = [sys.executable, str(_COMMAND), "--config-file", entry.config_file, "--resume", *settings]
    with open(folder / "console.txt", "w") as console:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        return subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT, env=environment)


def _planned_steps(entry: Entry) -> int:
    from classification.trainer import load_datasets

    cfg = load_cfg(entry.config_file, entry.opts)
    train_set, _ = load_datasets(cfg)
    return cfg.SOLVER.EPOCHS * math.ceil(len(train_set) / cfg.SOLVER.IMS_PER_BATCH)


def _done_steps(folder: Path) -> int:
    lines = read_metrics(folder)
    return int(lines[-1]["iteration"]) + 1 if lines else 0


class _Progress:
    """One line that is written over on a terminal; a new line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self.start, self.shown, self.already = time.perf_counter(), -math.inf, None

    def show(self, runs: str, done: int, total: int, last: bool) -> None:
        elapsed = time.perf_counter() - self.start
        if self.already is None:
            self.already = done  # by an earlier call, in no time
        new = done - self.already
        left = f"about {elapsed / new * (total - done):.0f} s left" if new else "starting"
        line = f"{runs}, {done}/{total} steps ({100 * done // total} %), {elapsed:.0f} s, {left}"
        if sys.stderr.isatty():
            print(f"\r{line:<75}", end="", file=sys.stderr, flush=True)
        elif elapsed - self.shown >= 10 or last:
            self.shown = elapsed
            print(line, file=sys.stderr, flush=True)


def _mean_std(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
