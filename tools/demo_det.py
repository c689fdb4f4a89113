#!/usr/bin/env python3
"""`make demo-det`: a teacher, and one small detector trained alone and with DKD + ReviewKD.

Real handwritten digits on textured ground, under 15 minutes of CPU time. Prints COCO's average precisions and draws
what each detector finds. A demo that was stopped continues; one that has ended shows its results again.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import require_detectron2

if TYPE_CHECKING:
    from d2distill.tools.comparison import Entry

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "det"
#: Of all runs: the table has the teacher's precision from its own training.
SETTINGS = ["TEST.TEACHER", "False"]
NEXT = """
What next:
  python tools/predict.py {student} {pictures} --output predictions
      the distilled student finds the digits in pictures that it has not seen
  python tools/sweep.py {config} DISTILL.REVIEWKD.WEIGHT=0.01,0.1 TEACHER.MODEL.WEIGHTS={teacher} --output {output}
      a leaderboard of settings over three seeds
  python tools/list.py methods --filter detection
      the methods that work in detectors
  docs/own_data.md
      your own pictures with boxes in COCO's format
"""


def entries(seeds: list[int], opts: list[str]) -> "list[Entry]":
    from d2distill.tools.comparison import Entry

    teacher = Entry("teacher", str(CONFIGS / "digits_r18.yaml"), [0], opts)
    return [
        teacher,
        Entry("student alone", str(CONFIGS / "digits_r50_narrow.yaml"), seeds, opts),
        Entry("distilled", str(CONFIGS / "review_dkd_digits_r18_r50_narrow.yaml"), seeds, opts, teacher),
    ]


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_runs("output/demo_det")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the students (default: 0 1)")
    parser.add_settings()
    args = parser.parse_args()
    require_detectron2()
    from d2distill.common.data.locate import data_path
    from d2distill.detection.data.digits_coco import ensure_generated
    from d2distill.tools.comparison import DETECTION, Comparison
    from d2distill.tools.drawing import draw_detections
    from d2distill.tools.leaderboard import write_leaderboard

    comparison = Comparison(DETECTION, entries(args.seeds, args.opts), args.output, SETTINGS)
    print("1/3: drawing 500 pictures of digits, or finding them in DETECTRON2_DATASETS", flush=True)
    ensure_generated("digits_coco")
    print("2/3: a teacher and students learn from 400 of them, the students alone and with the teacher", flush=True)
    comparison.run(args.jobs)
    print("3/3: drawing what they find", flush=True)
    picture = Path(args.output, "detections.png")
    draw_detections(comparison, picture)
    results = comparison.table()
    Path(args.output, "results.md").write_text(results + "\n")
    write_leaderboard(comparison, comparison.entries[1], "make demo-det")
    print(f"\nAverage precisions on 100 pictures, in percent:\n\n{results}\n\nDetections (first seed): {picture}")
    last = comparison.entries[-1]
    student = Path(args.output, last.run_name(args.seeds[0]))
    config = f"det/{Path(last.config_file).name}"
    pictures = data_path("digits_coco/val")
    teacher = Path(args.output, comparison.entries[0].run_name(0), "student_final.pth")
    print(NEXT.format(student=student, pictures=pictures, config=config, output=args.output, teacher=teacher))


if __name__ == "__main__":
    run_cli(main)
