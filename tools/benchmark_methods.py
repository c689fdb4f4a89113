#!/usr/bin/env python3
"""A results table of all methods on one data set: teacher, plain student, and every student with a method.

    python tools/benchmark_methods.py                  # real digits, three seeds
    python tools/benchmark_methods.py --only kd dkd --seeds 0 1 2 3 4

Writes the table to benchmarks/results/ under the device's name. Interrupted, it goes on where it was.
"""

import argparse
from pathlib import Path

import torch
from detectron2.utils.collect_env import collect_env_info

from d2distill.classification.compare import Entry, draw_curves, run_all, table
from d2distill.common.engine.cli import run_cli

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="digits_vgg8", help="config of the teacher (default: %(default)s)")
    parser.add_argument("--student", default="digits_r8", help="config of the plain student (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], help="endings of the configs to run, e.g. kd dkd")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", default="output/benchmark", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: %(default)s)")
    args = parser.parse_args()
    folder = ROOT / "configs" / "cls"
    data_set, student_name = args.student.split("_", 1)
    teacher = Entry("teacher alone", str(folder / f"{args.teacher}.yaml"), args.seeds[:1])
    plain = Entry("student alone", str(folder / f"{args.student}.yaml"), args.seeds)
    weights = ["MODEL.TEACHER.WEIGHTS", str(teacher.folders(args.output)[0] / "student_final.pth")]
    pattern = f"{data_set}_*{student_name}_*.yaml"
    configs = {path.stem.rpartition(f"{student_name}_")[2]: path for path in sorted(folder.glob(pattern))}
    names = args.only or list(configs)
    students = [Entry(name, str(configs[name]), args.seeds, weights) for name in names]
    print(f"Teacher and plain student first, then {len(students)} students with {', '.join(names)}", flush=True)
    run_all([teacher, plain], args.output, args.processes)
    run_all(students, args.output, args.processes)
    rows = [teacher, plain, *students]
    device = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    stem = ROOT / "benchmarks" / "results" / f"{data_set}_methods_{device}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    facts = f"`python tools/benchmark_methods.py`, seeds {args.seeds}, {args.teacher} -> {args.student}\n\n"
    stem.with_suffix(".md").write_text(facts + table(rows, args.output) + "\n")
    stem.with_suffix(".txt").write_text(collect_env_info() + "\n")
    draw_curves(rows[1:], args.output, Path(args.output, "learning_curves.png"), f"{args.teacher} -> {args.student}")
    print(stem.with_suffix(".md").read_text())


if __name__ == "__main__":
    run_cli(main)
