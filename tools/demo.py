#!/usr/bin/env python3
"""`make demo`: a teacher, and one small student trained alone, with KD and with DKD, over three seeds.

Real handwritten digits, under 5 minutes on two cores. Prints a table and draws the learning curves.
"""

import argparse
import shutil
from pathlib import Path

from d2distill.classification.compare import Entry, draw_curves, run_all, table
from d2distill.common.engine.cli import run_cli

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "cls"
SEEDS = (0, 1, 2)


def entries(output: str) -> list[Entry]:
    teacher = Entry("teacher (vgg8)", str(CONFIGS / "digits_vgg8.yaml"), [0])
    weights = ["MODEL.TEACHER.WEIGHTS", str(teacher.folders(output)[0] / "student_final.pth")]
    return [
        teacher,
        Entry("student alone (resnet8)", str(CONFIGS / "digits_r8.yaml"), SEEDS),
        Entry("student with KD", str(CONFIGS / "digits_vgg8_r8_kd.yaml"), SEEDS, weights),
        Entry("student with DKD", str(CONFIGS / "digits_vgg8_r8_dkd.yaml"), SEEDS, weights),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/demo", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: %(default)s)")
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    rows = entries(args.output)
    print("1/2: the teacher learns from 1,297 digits, three students alone from 100 of them", flush=True)
    run_all(rows[:2], args.output, args.processes)
    print("2/2: the same students learn from the same 100 digits and the teacher", flush=True)
    run_all(rows[2:], args.output, args.processes)
    picture = Path(args.output, "learning_curves.png")
    draw_curves(rows[1:], args.output, picture, "resnet8 on 100 real digits, teacher vgg8")
    results = table(rows, args.output)
    Path(args.output, "results.md").write_text(results + "\n")
    print(f"\nTop-1 on 500 test digits, last and best epoch:\n\n{results}\n\nLearning curves: {picture}")


if __name__ == "__main__":
    run_cli(main)
