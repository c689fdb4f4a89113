"""Average precision of a teacher and its students, trained side by side; whenever it is stopped, it goes on there."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

__all__ = ["Entry", "entries", "run_until", "table"]

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "det"
TEACHER, STUDENT, METHODS = "large_digits_r50", "large_digits_r18", "large_digits_r50_r18_"
#: Exit code of a run that saved on SIGTERM.
SAVED = 143


@dataclass
class Entry:
    """One row of the table: a configuration of ``detection/train_net.py``, a run for each seed.

    Attributes:
        needs: a file that must be there before it can start.
    """

    label: str
    config: str
    seeds: list[int]
    runs: Path
    opts: list[str] = field(default_factory=list)
    needs: Path | None = None

    def folder(self, seed: int) -> Path:
        return self.runs / f"{self.config}_seed{seed}"

    def results(self) -> dict[int, dict[str, float]]:
        """``results.json`` of each seed whose run has ended."""
        found = {seed: self.folder(seed) / "results.json" for seed in self.seeds}
        numbers = {seed: json.loads(path.read_text()) for seed, path in found.items() if path.is_file()}
        # null where a set has no objects of a size.
        return {seed: {name: v for name, v in run.items() if v is not None} for seed, run in numbers.items()}


def entries(runs: Path, seeds: list[int], opts: list[str], most: int | None = None) -> list[Entry]:
    """Teacher, plain student, and students of every configuration there is (of the first `most`)."""
    teacher = Entry("teacher alone", TEACHER, seeds[:1], runs, opts)
    weights = teacher.folder(seeds[0]) / "student_final.pth"
    rows = [teacher, Entry("student alone", STUDENT, seeds, runs, opts)]
    for path in sorted(CONFIGS.glob(f"{METHODS}*.yaml"))[:most]:
        label = path.stem.removeprefix(METHODS)
        rows.append(Entry(label, path.stem, seeds, runs, [*opts, "TEACHER.MODEL.WEIGHTS", str(weights)], weights))
    return rows


def run_until(rows: list[Entry], processes: int, deadline: float) -> list[str]:
    """Train every row's seeds, `processes` at a time, until `deadline` (of time.monotonic()); then all save and end.

    Returns:
        The runs that failed, each with the end of its log.
    """
    waiting = [(row, seed) for row in rows for seed in row.seeds if seed not in row.results()]
    total, running, failed = len(waiting), {}, []
    shown = -math.inf
    try:
        while time.monotonic() < deadline and (waiting or running):
            ready = [job for job in waiting if job[0].needs is None or job[0].needs.is_file()]
            for row, seed in ready[: processes - len(running)]:
                waiting.remove((row, seed))
                running[row.folder(seed)] = _start(row, seed)
            if not running:
                failed.append(f"{len(waiting)} runs have no teacher")
                break
            time.sleep(0.2)
            for folder in [folder for folder, process in running.items() if process.poll() is not None]:
                if running.pop(folder).returncode:
                    failed.append(f"{folder.name}: {_end(folder)}")
            if time.monotonic() - shown > 20:
                shown = time.monotonic()
                print(f"{total - len(waiting) - len(running)}/{total} runs ended, {len(running)} running", flush=True)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for folder, process in running.items():
            try:
                # One that was still starting has nothing to save, and ends by the signal.
                if process.wait(60) not in (0, SAVED, -signal.SIGTERM):
                    failed.append(f"{folder.name}: {_end(folder)}")
            except subprocess.TimeoutExpired:
                process.kill()  # its last periodic checkpoint stays
    return failed


def table(rows: list[Entry]) -> str:
    """Mean and sample standard deviation over the seeds that have ended."""
    lines = []
    for row in rows:
        results = list(row.results().values())
        cells = ["-"] * 5
        if results:
            metrics = [[run[f"bbox/{name}"] for run in results] for name in ("AP", "AP50", "AP75")]
            seconds = statistics.mean(run["seconds"] for run in results)
            cells = [*map(_mean_std, metrics), f"{results[0]['parameters'] / 1e6:.1f} M", f"{seconds:.0f} s"]
        lines.append([row.label, *cells, f"{len(results)} of {len(row.seeds)}"])
    headers = ["", "AP", "AP50", "AP75", "parameters", "time per run", "seeds"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def _start(row: Entry, seed: int) -> subprocess.Popen:
    folder = row.folder(seed)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "detection" / "train_net.py"), "--resume"]
    command += ["--config-file", str(CONFIGS / f"{row.config}.yaml"), "SEED", str(seed), "OUTPUT_DIR", str(folder)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(folder / "console.txt", "a") as console:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        # Configurations name the teacher's relative to the repository's root.
        return subprocess.Popen([*command, *row.opts], stdout=console, stderr=console, env=environment, cwd=ROOT)


def _end(folder: Path) -> str:
    return " | ".join((folder / "console.txt").read_text().splitlines()[-3:])


def _mean_std(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"
