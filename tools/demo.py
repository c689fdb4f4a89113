#!/usr/bin/env python3
"""`make demo`: a teacher, and one small student trained alone, with KD and with DKD, over three seeds.

Real handwritten digits, under 5 minutes of CPU time. Prints a table and draws the learning curves. A demo that was
stopped continues; one that has ended shows its results again.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import require_detectron2

if TYPE_CHECKING:
    from d2distill.tools.comparison import Entry

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "cls"
SEEDS = (0, 1, 2)
#: Of all runs. A student takes seconds: to evaluate and save it more often would be a third of that.
SETTINGS = ["TEST.EVAL_PERIOD", "8", "SOLVER.CHECKPOINT_PERIOD", "16", "SOLVER.MEMORY_FORMAT", "channels_last"]
NEXT = """
What next:
  python tools/predict.py {student} {picture}
      the distilled student names the digit in that picture
  python tools/sweep.py cls/digits_vgg8_r8_kd.yaml DISTILL.KD.T=1,4 MODEL.TEACHER.WEIGHTS={teacher} --output {output}
      a leaderboard of settings over three seeds
  python tools/list.py methods
      all methods, what they need and what they reached on these digits
  docs/own_data.md
      your own pictures: from a folder to a student that ships
"""


def entries() -> "list[Entry]":
    from d2distill.tools.comparison import Entry

    teacher = Entry("teacher (vgg8)", str(CONFIGS / "digits_vgg8_short.yaml"), [0])
    return [
        teacher,
        Entry("student alone (resnet8)", str(CONFIGS / "digits_r8.yaml"), SEEDS),
        Entry("student with KD", str(CONFIGS / "digits_vgg8_r8_kd.yaml"), SEEDS, teacher=teacher),
        Entry("student with DKD", str(CONFIGS / "digits_vgg8_r8_dkd.yaml"), SEEDS, teacher=teacher),
    ]


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_runs("output/demo")
    args = parser.parse_args()
    require_detectron2()
    from PIL import Image

    from d2distill.classification.data import build_dataset
    from d2distill.tools.comparison import CLASSIFICATION, Comparison
    from d2distill.tools.launchers import LocalLauncher
    from d2distill.tools.leaderboard import write_leaderboard

    comparison = Comparison(CLASSIFICATION, entries(), args.output, SETTINGS)
    print("A teacher learns from 1,297 digits; nine students learn from 100 of them, alone and with it", flush=True)
    comparison.run(args.jobs, launcher=LocalLauncher(preload=[*CLASSIFICATION.modules, "sklearn.datasets"]))
    picture = Path(args.output, "learning_curves.png")
    comparison.draw_curves(comparison.entries[1:], picture, "resnet8 on 100 real digits, teacher vgg8")
    results = comparison.table()
    Path(args.output, "results.md").write_text(results + "\n")
    write_leaderboard(comparison, comparison.entries[1], "make demo")
    print(f"\nTop-1 on 500 test digits, last and best epoch:\n\n{results}\n\nLearning curves: {picture}")
    digit, student = Path(args.output, "digit.png"), Path(args.output, comparison.entries[-1].run_name(SEEDS[0]))
    pixels, _ = build_dataset("digits", "", "val").load(250)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(digit)
    teacher = Path(args.output, comparison.entries[0].run_name(0), "student_final.pth")
    print(NEXT.format(student=student, picture=digit, output=args.output, teacher=teacher))


if __name__ == "__main__":
    run_cli(main)
