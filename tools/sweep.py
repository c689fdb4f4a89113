#!/usr/bin/env python3
"""Train every combination of configurations, settings and seeds, and rank them.

python tools/sweep.py cls/digits_r8.yaml cls/digits_vgg8_r8_kd.yaml --teacher cls/digits_vgg8.yaml
python tools/sweep.py FILE SOLVER.BASE_LR=0.01,0.05 "SOLVER.STEPS=[30,60],[40,80]" --seeds 0 1 2
python tools/sweep.py FILE DISTILL.KD.T=1,2,4 --slurm partition=gpu gpus_per_node=1 time=600

KEY=a,b,c is a row for each value; a value in brackets is one list. KEY=a holds for all runs, the teacher's too.
Every run has a folder of its own below --output, named after its settings. The same command again continues runs that
were stopped and skips those that are done. --output then holds leaderboard.md, leaderboard.csv and leaderboard.html.

Classifiers and detectors, told apart by their configurations. The exit code is 1 if runs failed; the others continue.
"""

import itertools
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import ConfigError, did_you_mean, require_detectron2
from d2distill.common.text import printable
from d2distill.configs import find_config

if TYPE_CHECKING:
    from d2distill.tools.comparison import Entry, Task

_OWN = {"SEED": "--seeds 0 1 2", "OUTPUT_DIR": "--output DIR"}


def main() -> None:
    """``d2distill-sweep``."""
    run_cli(_main)


def _main() -> None:
    parser = CommandParser(description=__doc__)
    parser.intermixed = True
    parser.add_argument(
        "items", nargs="*", metavar="CONFIG|KEY=a,b,c", help="YAML files, d2distill's too, and settings"
    )
    parser.add_argument("--seeds", nargs="+", metavar="N", default=["0", "1", "2"], help="(default: 0 1 2)")
    parser.add_argument("--teacher", metavar="CONFIG", help="train it first, and give it to all rows that need one")
    parser.add_argument("--baseline", metavar="LABEL", help="the row that others are tested against (default: first)")
    parser.add_runs("output/sweep")
    parser.add_argument(
        "--slurm", nargs="+", metavar="KEY=VALUE", help="make jobs of SLURM, with sbatch's options; needs submitit"
    )
    args = parser.parse_args()
    # Both take all that follows them.
    seeds, more = _divide(args.seeds, str.isdecimal)
    slurm, others = _divide(args.slurm or (), re.compile(r"[a-z_]+=").match)
    items = [*args.items, *more, *others]
    grid, configs = _divide(items, re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*=").match)
    if not configs or not seeds:
        raise ConfigError(f"name at least one {'CONFIG' if seeds else 'seed'}; see {parser.prog} --help")
    require_detectron2()
    from d2distill.common.config_node import parse_as
    from d2distill.tools.comparison import Comparison, RunsFailed
    from d2distill.tools.launchers import LocalLauncher, SlurmLauncher
    from d2distill.tools.leaderboard import write_leaderboard

    files = [_file(name) for name in configs]
    teacher_file = _file(args.teacher) if args.teacher else ""
    task = _one_task([*files, *([teacher_file] if teacher_file else [])])
    rows = entries(task, files, [int(seed) for seed in seeds], dict(map(_values, grid)), teacher_file)
    comparison = Comparison(task, rows, args.output)
    first = next(row for row in rows if not row.label.startswith("teacher: "))
    labels = {row.label: row for row in rows}
    if args.baseline and args.baseline not in labels:
        nearest = did_you_mean(args.baseline, labels)
        raise ConfigError(f"--baseline {args.baseline}: no such row{nearest}; there are {', '.join(labels)}")
    baseline = labels.get(args.baseline, first)
    launcher = LocalLauncher(preload=task.modules)
    if slurm:
        # Not YAML, to which a time of 10:00:00 is a number.
        pairs = (item.split("=", 1) for item in slurm)
        settings = {key: parse_as(value, (int, float, bool, str)) for key, value in pairs}
        launcher = SlurmLauncher(comparison.output_dir / "slurm", settings)
    print(f"{len(rows)} rows, {sum(len(row.seeds) for row in rows)} runs in {args.output}", flush=True)
    failed = ""
    try:
        comparison.run(args.jobs, launcher=launcher)
    except RunsFailed as error:
        failed = str(error)
    command = shlex.join(["d2distill-sweep", *sys.argv[1:]])
    print(f"\n{write_leaderboard(comparison, baseline, command)}\n\nLeaderboard: {args.output}/leaderboard.html")
    if failed:
        print(f"\n{printable(failed, lines=True)}", file=sys.stderr)
        raise SystemExit(1)


def entries(
    task: "Task", configs: Sequence[str], seeds: Sequence[int], grid: dict[str, list[str]], teacher_file: str = ""
) -> "list[Entry]":
    """The rows: every configuration with every combination of the grid's values, after the teacher's row.

    Raises:
        ConfigError: an invalid setting, two configurations of one name, or a teacher that no row needs.
    """
    from d2distill.common.config import chosen_methods
    from d2distill.common.config_node import load_yaml
    from d2distill.tools.comparison import Entry

    stems = [Path(file).stem for file in configs]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), ""):
        raise ConfigError(f"two configurations are called {twice}.yaml: run folders are named after them; rename one")
    fixed = [part for key, values in grid.items() if len(values) == 1 for part in (key, values[0])]
    varied = {key: values for key, values in grid.items() if len(values) > 1}
    teacher, network = None, ()
    if teacher_file:
        teacher = Entry(f"teacher: {Path(teacher_file).stem}", teacher_file, [0], fixed)
        network = task.teacher_network(teacher_file, task.load_cfg(teacher_file, fixed))
    rows = {}
    for file, values in itertools.product(configs, itertools.product(*varied.values())):
        chosen = dict(zip(varied, values, strict=True))
        opts = [*fixed, *itertools.chain(*chosen.items())]
        named = () if not teacher or _given(network[0], load_yaml(file), opts) else network
        methods = chosen_methods(task.load_cfg(file, [*opts, *named]))
        with_teacher = teacher if any(method.needs_teacher for method in methods.values()) else None
        # A row without a method is the same whatever that method's settings are.
        nodes = [f"DISTILL.{name.upper()}." for name in methods]
        idle = [key for key in chosen if re.match(r"DISTILL\.\w+\.", key) and not key.startswith(tuple(nodes))]
        chosen = {key: value for key, value in chosen.items() if key not in idle}
        opts = [*fixed, *itertools.chain(*chosen.items()), *(named if with_teacher else ())]
        label = " ".join([Path(file).stem, *(f"{key}={value}" for key, value in chosen.items())])
        rows[label] = Entry(label, file, seeds, opts, with_teacher)
    if teacher and all(row.teacher is None for row in rows.values()):
        raise ConfigError(f"--teacher {teacher_file}: no row has a method that needs a teacher; see DISTILL.METHODS")
    return [teacher, *rows.values()] if teacher else [*rows.values()]


def _given(key: str, settings: dict[str, Any], opts: Sequence[str]) -> bool:
    """Whether a file or the settings after it say what `key` is."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return bool(settings) or key in opts[::2]


def _divide(items: Sequence[str], is_first: Callable[[str], object]) -> tuple[list[str], list[str]]:
    return [item for item in items if is_first(item)], [item for item in items if not is_first(item)]


def _file(name: str) -> str:
    file = find_config(name)
    if not Path(file).is_file():
        raise ConfigError(f"{name}: no such file, nor one of d2distill's configs; settings are written KEY=a,b,c")
    return str(Path(file).absolute())


def _values(item: str) -> tuple[str, list[str]]:
    """KEY and its values, each as it was written: YAML's commas and brackets, but no YAML types."""
    key, _, text = item.partition("=")
    if key in _OWN:
        raise ConfigError(f"{item}: every run has its own; use {_OWN[key]}")
    if not text:
        return key, [""]
    try:
        nodes = yaml.compose(f"[{text}]", yaml.SafeLoader).value
        return key, [f"[{text}]"[node.start_mark.index : node.end_mark.index].strip() for node in nodes]
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise ConfigError(f"{item}: values have commas between them, lists have brackets: KEY=[1,2],[3,4]") from error


def _one_task(files: Sequence[str]) -> "Task":
    """The task of the configurations: classifiers name MODEL.STUDENT or DATASETS.NAME, which detectors have not."""
    from d2distill.common.config_node import load_yaml
    from d2distill.tools.comparison import CLASSIFICATION, DETECTION

    def is_classifier(file: str) -> bool:
        settings = load_yaml(file)
        nodes = {name: settings.get(name) or {} for name in ("MODEL", "DATASETS")}
        return "STUDENT" in nodes["MODEL"] or "NAME" in nodes["DATASETS"]

    classifiers, detectors = _divide(files, is_classifier)
    if classifiers and detectors:
        raise ConfigError(
            f"{classifiers[0]} trains a classifier and {detectors[0]} a detector: sweep one task at a time"
        )
    return CLASSIFICATION if classifiers else DETECTION


if __name__ == "__main__":
    main()
