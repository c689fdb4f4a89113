"""Training runs side by side: several configurations, each over several seeds; their table and their learning curves.

Each run is the command a user would type, in a process of its own. Runs that have ended are not repeated, and runs that
were stopped are resumed. The one harness of sweeps, demos and the table of all methods.
"""

import hashlib
import json
import math
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import yaml
from fvcore.common.config import CfgNode
from tabulate import tabulate

from d2distill.common.engine.folder_lock import check_folder, folder_user, lock_folder
from d2distill.common.engine.settings import flat_settings
from d2distill.common.errors import ConfigError, UserError
from d2distill.tools.launchers import Launcher, LocalLauncher, Run, stop_signals
from d2distill.tools.progress import LastLine, runs_bar

__all__ = ["CLASSIFICATION", "DETECTION", "Comparison", "Entry", "RunsFailed", "Task", "mean_std"]

ROOT = Path(__file__).resolve().parent.parent
#: The cell of a table made of the ``results.json`` of a row's runs.
Column = Callable[[Sequence[dict[str, float]]], str]


@dataclass(frozen=True)
class Entry:
    """One row of a comparison: a configuration of the task's training command, with a run for each seed.

    Attributes:
        label: its name in the table and in the picture.
        opts: further settings, as KEY VALUE pairs.
        teacher: the row whose first run trains this row's teacher.
    """

    label: str
    config_file: str
    seeds: Sequence[int]
    opts: Sequence[str] = ()
    teacher: "Entry | None" = None

    def run_name(self, seed: int) -> str:
        """The name of a run folder: configuration, settings, teacher, and seed, with a hash where that is long.

        A teacher without settings and of seed 0 is left out where the configuration's name says it.
        """
        stem = Path(self.config_file).stem
        settings = dict(sorted(zip(self.opts[0::2], self.opts[1::2], strict=False)))
        if self.teacher:
            teacher = self.teacher.run_name(self.teacher.seeds[0])
            if teacher.removesuffix("_seed0") not in stem:
                settings["teacher"] = teacher
        text = "_".join(f"{key}={value}" for key, value in settings.items())
        readable = re.sub(r"[^\w.=+-]+", "-", text)
        if readable != text or len(text) > 60:
            readable = f"{readable[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        return "_".join(part for part in (stem, readable, f"seed{seed}") if part)


class RunsFailed(UserError):
    """Runs ended with an error; the message has the last lines of their logs."""


def mean_std(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation, two decimals each; of one value that value alone; of undefined ones n/a."""
    if None in values:
        return "n/a"
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def _mean(key: str) -> Column:
    return lambda runs: mean_std([run[key] for run in runs])


def _millions(key: str, decimals: int) -> Column:
    return lambda runs: f"{runs[0][key] / 1e6:.{decimals}f} M"


def _load_cfg(task: str) -> Callable[[str, Sequence[str]], CfgNode]:
    # A wrong key is answered before torch and the other task are imported.
    return lambda file, opts: import_module(f"d2distill.{task}.config").load_cfg(file, opts)


@dataclass(frozen=True)
class Task:
    """What comparisons of classifiers and of detectors do not share.

    Attributes:
        script: the training command; takes ``--config-file``, ``--resume`` and KEY VALUE pairs.
        load_cfg: reads a configuration file and KEY VALUE pairs.
        teacher_key: the setting that names the teacher's weights.
        columns: of the table.
        metrics: of which a run has one, by which rows are ranked; the larger the better.
        teacher_network: the setting that names a teacher's network, and its value, from the teacher's own file and
            configuration.
        share: of a run that is done, from a line of its metrics.json and its configuration.
        modules: that the training command imports.
        cache_key: the setting that names a folder for a teacher's outputs; all rows share one. Empty: there is none.
    """

    script: Path
    load_cfg: Callable[[str, Sequence[str]], CfgNode]
    teacher_key: str
    columns: dict[str, Column]
    metrics: tuple[str, ...]
    teacher_network: Callable[[str, CfgNode], tuple[str, str]]
    share: Callable[[Mapping[str, float], CfgNode], float]
    modules: tuple[str, ...]
    cache_key: str = ""


CLASSIFICATION = Task(
    ROOT / "tools" / "train_cls.py",
    _load_cfg("classification"),
    "MODEL.TEACHER.WEIGHTS",
    {
        "last top-1 (%)": _mean("top1"),
        "best top-1 (%)": _mean("best_top1"),
        "parameters": _millions("parameters", 3),
        "FLOPs": _millions("flops", 1),
    },
    ("top1", "mAP"),
    lambda file, cfg: ("MODEL.TEACHER.NAME", cfg.MODEL.STUDENT.NAME),
    lambda line, cfg: line.get("epoch", 0) / cfg.SOLVER.EPOCHS,
    ("d2distill.classification.trainer",),
    "MODEL.TEACHER.CACHE",
)
DETECTION = Task(
    ROOT / "detection" / "train_net.py",
    _load_cfg("detection"),
    "TEACHER.MODEL.WEIGHTS",
    {
        "AP": _mean("bbox/AP"),
        "best AP": _mean("best_bbox/AP"),
        **{name: _mean(f"bbox/{name}") for name in ("AP50", "AP75", "APs", "APm")},
        "parameters": _millions("parameters", 2),
    },
    ("bbox/AP",),
    lambda file, cfg: ("TEACHER.CONFIG_FILE", file),
    lambda line, cfg: (line["iteration"] + 1) / cfg.SOLVER.MAX_ITER,
    ("d2distill.detection.trainer",),
)


class Comparison:
    """The rows of a table, and their runs in a folder for each.

    Args:
        settings: of all runs, as KEY VALUE pairs. They are not in the folders' names.

    Raises:
        ConfigError: two rows or runs have one name, a configuration is invalid, or a folder holds a run with other
            settings, whose results are not the row's.
    """

    def __init__(
        self, task: Task, entries: Sequence[Entry], output_dir: str | Path, settings: Sequence[str] = ()
    ) -> None:
        self.task, self.entries, self.output_dir = task, entries, Path(output_dir).absolute()
        self.settings = settings
        names = [entry.label for entry in entries] + [entry.run_name(seed) for entry in entries for seed in entry.seeds]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"two rows or runs are called {twice[0]}: change a label, a setting or a seed")
        self._cfgs = {entry.label: self._check(entry) for entry in entries}

    def folder(self, entry: Entry, seed: int) -> Path:
        return self.output_dir / entry.run_name(seed)

    def results(self, entry: Entry) -> dict[int, dict[str, float]]:
        """``results.json`` of each seed whose run has ended."""
        ended = {seed: self.folder(entry, seed) for seed in entry.seeds if self._ended(entry, seed)}
        return {seed: json.loads((folder / "results.json").read_text()) for seed, folder in ended.items()}

    def run(self, jobs: int, deadline: float = math.inf, launcher: Launcher | None = None) -> None:
        """Train every row with every seed, in this order, so many jobs at a time, and show the progress.

        A row waits for its teacher, and a run for a process that trains in its folder already, such as one that a
        killed call left behind. A run that fails stops no other. At the deadline (of ``time.monotonic()``), and on
        SIGINT, SIGTERM and SIGHUP, the runs save and stop; the next call resumes them.

        Args:
            jobs: 0 for as many as the launcher takes by itself.
            launcher: starts the runs, on this machine if it is None.

        Raises:
            ConfigError: another call runs in the same folder.
            OutputError: the folder was removed.
            RunsFailed: after all others have ended.
            SystemExit: after a signal, with 128 + its number.
        """
        launcher = launcher or LocalLauncher(preload=self.task.modules)
        jobs = jobs or launcher.jobs
        everything = [(entry, seed) for entry in self.entries for seed in entry.seeds]
        waiting = [job for job in everything if not self._ended(*job)]
        trained = {entry.label for entry in self.entries if self.results(entry)}
        running: list[tuple[tuple[Entry, int], Run, LastLine]] = []
        failures = []
        users: dict[Path, str] = {}
        with (
            lock_folder(self.output_dir, "--output"),
            runs_bar(len(everything) - len(waiting), len(everything)) as bar,
            stop_signals() as received,
        ):
            try:
                while (waiting or running) and not received and time.monotonic() < deadline:
                    check_folder(self.output_dir)
                    ready = [job for job in waiting if job[0].teacher is None or job[0].teacher.label in trained]
                    for job in ready:
                        if len(running) == jobs:
                            break
                        folder = self.folder(*job)
                        if user := folder_user(folder):
                            if users.get(folder) != user:
                                bar.write(f"waiting for {folder}, which is in use by {user}", file=sys.stderr)
                            users[folder] = user
                            continue
                        waiting.remove(job)
                        folder.mkdir(parents=True, exist_ok=True)
                        running.append((job, launcher.start(self._command(*job), folder), LastLine(folder)))
                    if not running and not ready:
                        failures.append(f"{len(waiting)} runs have no teacher")
                        break
                    time.sleep(0.2)
                    for one in [one for one in running if one[1].poll() is not None]:
                        running.remove(one)
                        job, run, _ = one
                        if self._ended(*job):
                            trained.add(job[0].label)
                        if run.poll():
                            folder = self.folder(*job)
                            failures.append("\n".join([f"the run in {folder} failed:", *run.log_end()]))
                            bar.write(f"{folder} failed", file=sys.stderr)
                    # Every run counts alike, and as far as it is.
                    ended = len(everything) - len(waiting) - len(running)
                    shares = [self._share(job[0], log) for job, _, log in running]
                    bar.set_description_str(f"{ended}/{len(everything)} runs", refresh=False)
                    bar.update(ended + sum(shares) - bar.n)
            finally:
                # All save at the same time, after their step.
                for _, run, _ in running:
                    run.stop()
                for _, run, _ in running:
                    run.wait()
                launcher.close()
        if received:
            name = signal.Signals(received[0]).name
            print(f"{name}: what ran is saved; the same command continues", file=sys.stderr)
            raise SystemExit(128 + received[0])
        if failures:
            raise RunsFailed("\n".join(failures))

    def table(self) -> str:
        """Mean +- sample standard deviation over the seeds that have ended, and the time per run, evaluations included.

        AP is the last evaluation's; the best one's has a column where any row has another.
        """
        rows = []
        for entry in self.entries:
            runs, seeds = list(self.results(entry).values()), len(entry.seeds)
            row = {"": entry.label}
            row |= {name: column(runs) if runs else "-" for name, column in self.task.columns.items()}
            row["time per run"] = f"{statistics.mean(run['seconds'] for run in runs):.0f} s" if runs else "-"
            row["seeds"] = f"{seeds}" if len(runs) == seeds else f"{len(runs)} of {seeds}"
            rows.append(row)
        if all(row.get("best AP") == row.get("AP") for row in rows):
            rows = [{name: cell for name, cell in row.items() if name != "best AP"} for row in rows]
        return tabulate(rows, "keys", tablefmt="github", disable_numparse=True)

    def draw_curves(self, entries: Sequence[Entry], path: str | Path, title: str) -> None:
        """Test top-1 over epochs as a PNG: mean over the seeds, with a band from the lowest to the highest."""
        from matplotlib.figure import Figure

        from d2distill.common.engine.run_folder import read_metrics

        axes = Figure(figsize=(7, 4.5), dpi=150, layout="constrained").add_subplot()
        lowest = []
        for entry in entries:
            logs = [read_metrics(self.folder(entry, seed)) for seed in self.results(entry)]
            epochs = [line["epoch"] for line in logs[0] if "top1" in line]
            columns = list(zip(*([line["top1"] for line in log if "top1" in line] for log in logs), strict=True))
            means = [statistics.mean(values) for values in columns]
            (line,) = axes.plot(epochs, means, label=f"{entry.label}: {means[-1]:.1f}", linewidth=1.5)
            band = [min(values) for values in columns], [max(values) for values in columns]
            axes.fill_between(epochs, *band, color=line.get_color(), alpha=0.2, linewidth=0)
            lowest.append(statistics.median(means))
        # The first epochs, near chance, would press everything else against the upper edge.
        axes.set(xlabel="epoch", ylabel="test top-1 (%)", title=title, ylim=(max(0.0, 2 * min(lowest) - 100), 100))
        axes.grid(alpha=0.3)
        axes.legend(title="last epoch, mean over seeds", loc="lower right")
        axes.figure.savefig(path)

    def _check(self, entry: Entry) -> CfgNode:
        """The row's configuration; run folders with other settings are refused."""
        cfg = self.task.load_cfg(entry.config_file, self._settings(entry))
        wanted = _flatten(cfg.dump())
        # Where a run is, and what its data set fills in. Seed and teacher are in the folder's name.
        ignored = {"SEED", "OUTPUT_DIR", "MODEL.NUM_CLASSES", self.task.cache_key}
        ignored |= {self.task.teacher_key} if entry.teacher else set()
        for seed in entry.seeds:
            file = self.folder(entry, seed) / "config.yaml"
            found = _flatten(file.read_text()) if file.exists() else {}
            changed = [key for key in found.keys() & wanted.keys() - ignored if found[key] != wanted[key]]
            if changed:
                other = "; ".join(f"{key} {found[key]!r}, not {wanted[key]!r}" for key in sorted(changed)[:3])
                raise ConfigError(
                    f"{file.parent} holds another run ({other}): choose another folder, or remove it and its students"
                )
        return cfg

    def _share(self, entry: Entry, log: LastLine) -> float:
        line = log.read()
        return min(self.task.share(line, self._cfgs[entry.label]), 1.0) if line else 0.0

    def _settings(self, entry: Entry) -> list[str]:
        if entry.teacher is None:
            return [*self.settings, *entry.opts]
        weights = self.folder(entry.teacher, entry.teacher.seeds[0]) / "student_final.pth"
        cache = [self.task.cache_key, str(self.output_dir / "teacher_outputs")] if self.task.cache_key else []
        return [*cache, *self.settings, *entry.opts, self.task.teacher_key, str(weights)]

    def _ended(self, entry: Entry, seed: int) -> bool:
        # Results without settings may be anyone's.
        return all((self.folder(entry, seed) / name).exists() for name in ("results.json", "config.yaml"))

    def _command(self, entry: Entry, seed: int) -> list[str]:
        settings = [*self._settings(entry), "SEED", str(seed), "OUTPUT_DIR", str(self.folder(entry, seed))]
        return [sys.executable, str(self.task.script), "--config-file", entry.config_file, "--resume", *settings]


def _flatten(config: str) -> dict[str, object]:
    return flat_settings(CfgNode(yaml.safe_load(config)))
