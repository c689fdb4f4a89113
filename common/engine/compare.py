"""Several configurations over several seeds, each run a process of its own: what all comparisons share."""

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from d2distill.common.engine.writers import read_metrics
from d2distill.common.errors import UserError

__all__ = ["Entry", "mean_std", "train_all"]


@dataclass
class Entry:
    """One row of the comparison.

    Attributes:
        label: how it is called in table and picture.
        config_file: a configuration of the command that trains.
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


def train_all(
    script: str | Path,
    entries: Sequence[Entry],
    output_dir: str | Path,
    processes: int,
    planned_steps: Callable[[Entry], int],
    threads: int = 1,
) -> None:
    """Train every entry with every seed, `processes` runs at a time, and show one line of progress.

    Each run is the command a user would type, in a process of its own, and goes on where an earlier call stopped. The
    runs are started in the order given.

    Args:
        script: the command; takes ``--config-file``, ``--resume`` and KEY VALUE pairs, among them SEED and OUTPUT_DIR.
        planned_steps: how many steps each run of an entry will make.
        threads: CPU threads of each run. Its last digits may depend on them, so they are not left to the machine.

    Raises:
        UserError: a run failed; the message ends with the last lines of its log.
    """
    jobs = [(entry, seed, folder) for e in entries for entry, seed, folder in _jobs(e, output_dir)]
    steps = {folder: planned_steps(entry) for entry, _, folder in jobs}
    waiting, running, progress = list(jobs), {}, _Progress()
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                entry, seed, folder = waiting.pop(0)
                running[folder] = _start(script, entry, seed, folder, threads)
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


def mean_std(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation, two decimals each; of one value that value alone; of undefined ones n/a."""
    if None in values:
        return "n/a"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _jobs(entry: Entry, output_dir: str | Path) -> list[tuple[Entry, int, Path]]:
    return [(entry, seed, folder) for seed, folder in zip(entry.seeds, entry.folders(output_dir), strict=True)]


def _start(script: str | Path, entry: Entry, seed: int, folder: Path, threads: int) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    settings = ["SEED", str(seed), "OUTPUT_DIR", str(folder), *entry.opts]
    command = [sys.executable, str(script), "--config-file", entry.config_file, "--resume", *settings]
    with open(folder / "console.txt", "w") as console:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        return subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT, env=environment)


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
