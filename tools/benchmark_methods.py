#!/usr/bin/env python3
"""A results table of all methods on one data set: teacher, plain student, and every student with a method.

    python tools/benchmark_methods.py                  # real digits, three seeds
    python tools/benchmark_methods.py --only kd dkd --seeds 0 1 2 3 4

Its table has every row whose runs have ended in the output folder, whichever call made them. Once that is all of them,
it is written to benchmarks/results/ as well, under the device's name. Interrupted, it continues where it was.
"""

from pathlib import Path

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import ConfigError, did_you_mean, require_detectron2

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "cls"


def students(teacher: str, student: str) -> dict[str, Path]:
    """The configurations of this pair, and those of the student with methods without a teacher, by their endings."""
    from d2distill.classification.config import load_cfg

    for flag, name in (("--teacher", teacher), ("--student", student)):
        if not (CONFIGS / f"{name}.yaml").is_file():
            # The plain networks: what has a teacher names two.
            known = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if "METHODS" not in path.read_text()]
            known = [stem for stem in known if not stem.startswith("base_")]
            raise ConfigError(f"{flag}: no {name}.yaml in {CONFIGS}{did_you_mean(name, known)}; there are {known}")
    alone = [path for path in sorted(CONFIGS.glob(f"{student}_*.yaml")) if not load_cfg(str(path)).MODEL.TEACHER.NAME]
    found = {path.stem.removeprefix(f"{student}_"): path for path in alone}
    pair = f"{teacher}_{student.partition('_')[2]}_"
    found |= {path.stem.removeprefix(pair): path for path in sorted(CONFIGS.glob(f"{pair}*.yaml"))}
    if not found:
        raise ConfigError(f"--teacher {teacher} --student {student}: there is no {pair}*.yaml in {CONFIGS}")
    return found


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_runs("output/benchmark")
    parser.add_argument("--teacher", default="digits_vgg8", help="config of the teacher (default: %(default)s)")
    parser.add_argument("--student", default="digits_r8", help="config of the plain student (default: %(default)s)")
    parser.add_argument("--only", nargs="*", help="endings of the configs to run, e.g. kd dkd")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    args = parser.parse_args()
    require_detectron2()
    configs = students(args.teacher, args.student)
    import torch
    from detectron2.utils.collect_env import collect_env_info

    from d2distill.tools.comparison import CLASSIFICATION, Comparison, Entry
    from d2distill.tools.leaderboard import write_leaderboard

    for name in args.only or ():
        if name not in configs:
            raise ConfigError(f"--only {name}: no such ending{did_you_mean(name, configs)}; there are {list(configs)}")
    teacher = Entry("teacher alone", str(CONFIGS / f"{args.teacher}.yaml"), args.seeds[:1])
    plain = Entry("student alone", str(CONFIGS / f"{args.student}.yaml"), args.seeds)
    rows = [teacher, plain]
    for name, path in configs.items():
        alone = path.stem.startswith(f"{args.student}_")
        rows.append(Entry(name, str(path), args.seeds, teacher=None if alone else teacher))
    chosen = [row for row in rows[2:] if not args.only or row.label in args.only]
    print(f"Teacher, plain student, and {len(chosen)} students: {', '.join(e.label for e in chosen)}", flush=True)
    everything = Comparison(CLASSIFICATION, rows, args.output)
    Comparison(CLASSIFICATION, [*rows[:2], *chosen], args.output).run(args.jobs)
    ended = [row for row in rows if len(everything.results(row)) == len(row.seeds)]
    comparison = Comparison(CLASSIFICATION, ended, args.output)
    table = comparison.table()
    write_leaderboard(comparison, plain, "python tools/benchmark_methods.py")
    text = f"`python tools/benchmark_methods.py`, seeds {args.seeds}, {args.teacher} -> {args.student}\n\n{table}\n"
    device = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    folders = [Path(args.output), *([ROOT / "benchmarks" / "results"] if ended == rows else [])]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"{args.student.partition('_')[0]}_methods_{device}"
        stem.with_suffix(".md").write_text(text)
        stem.with_suffix(".txt").write_text(collect_env_info() + "\n")
    title = f"{args.teacher} -> {args.student}"
    everything.draw_curves(ended[1:], Path(args.output, "learning_curves.png"), title)
    print(text)
    if ended != rows:
        print(f"{len(rows) - len(ended)} of {len(rows)} rows are not there yet: the table is in {args.output} only")


if __name__ == "__main__":
    run_cli(main)
