#!/usr/bin/env python3
"""`make demo-det`: a teacher, and one small detector trained alone and with DKD + ReviewKD.

Real handwritten digits on textured ground, under 15 minutes on two cores. Prints COCO's average precisions and draws
what each detector finds. A demo that was stopped continues; one that has ended shows its results again.
"""

from pathlib import Path

from d2distill.common.engine.cli import run_cli
from d2distill.detection.data.digits_coco import ensure_generated
from d2distill.tools.comparison import DETECTION, ROOT, Comparison, Entry, command_parser
from d2distill.tools.drawing import draw_detections

CONFIGS = ROOT / "configs" / "det"


def entries(seeds: list[int], opts: list[str]) -> list[Entry]:
    teacher = Entry("teacher", str(CONFIGS / "digits_r18.yaml"), [0], opts)
    return [
        teacher,
        Entry("student alone", str(CONFIGS / "digits_r50_narrow.yaml"), seeds, opts),
        Entry("distilled", str(CONFIGS / "review_dkd_digits_r18_r50_narrow.yaml"), seeds, opts, teacher),
    ]


def main() -> None:
    parser = command_parser(__doc__, "output/demo_det")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the students (default: %(default)s)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings of all runs")
    args = parser.parse_args()
    comparison = Comparison(DETECTION, entries(args.seeds, args.opts), args.output)
    print("1/3: drawing 500 pictures of digits, or finding them in DETECTRON2_DATASETS", flush=True)
    ensure_generated("digits_coco")
    print("2/3: a teacher and students learn from 400 of them, the students alone and with the teacher", flush=True)
    comparison.run(args.processes)
    print("3/3: drawing what they find", flush=True)
    picture = Path(args.output, "detections.png")
    draw_detections(comparison, picture)
    results = comparison.table()
    Path(args.output, "results.md").write_text(results + "\n")
    print(f"\nAverage precisions on 100 pictures, in percent:\n\n{results}\n\nDetections (first seed): {picture}")


if __name__ == "__main__":
    run_cli(main)
