#!/usr/bin/env python3
"""`make demo`: a teacher, and one small student trained alone, with KD and with DKD, over three seeds.

Real handwritten digits, under 5 minutes on two cores. Prints a table and draws the learning curves. A demo that was
stopped continues; one that has ended shows its results again.
"""

from pathlib import Path

from d2distill.common.engine.cli import run_cli
from d2distill.tools.comparison import CLASSIFICATION, ROOT, Comparison, Entry, command_parser

CONFIGS = ROOT / "configs" / "cls"
SEEDS = (0, 1, 2)


def entries() -> list[Entry]:
    teacher = Entry("teacher (vgg8)", str(CONFIGS / "digits_vgg8.yaml"), [0])
    return [
        teacher,
        Entry("student alone (resnet8)", str(CONFIGS / "digits_r8.yaml"), SEEDS),
        Entry("student with KD", str(CONFIGS / "digits_vgg8_r8_kd.yaml"), SEEDS, teacher=teacher),
        Entry("student with DKD", str(CONFIGS / "digits_vgg8_r8_dkd.yaml"), SEEDS, teacher=teacher),
    ]


def main() -> None:
    args = command_parser(__doc__, "output/demo").parse_args()
    comparison = Comparison(CLASSIFICATION, entries(), args.output)
    print("A teacher learns from 1,297 digits; nine students learn from 100 of them, alone and with it", flush=True)
    comparison.run(args.processes)
    picture = Path(args.output, "learning_curves.png")
    comparison.draw_curves(comparison.entries[1:], picture, "resnet8 on 100 real digits, teacher vgg8")
    results = comparison.table()
    Path(args.output, "results.md").write_text(results + "\n")
    print(f"\nTop-1 on 500 test digits, last and best epoch:\n\n{results}\n\nLearning curves: {picture}")


if __name__ == "__main__":
    run_cli(main)
