#!/usr/bin/env python3
"""`make demo-det`: a teacher, and one small detector trained alone and with DKD + ReviewKD.

Real handwritten digits on textured ground, under 15 minutes on two cores. Prints COCO's average precisions and draws
what each detector finds.
"""

import argparse
import shutil
from pathlib import Path

from d2distill.common.engine.cli import run_cli
from d2distill.detection.compare import Entry, results_of, run_all, table
from d2distill.detection.data.digits_coco import prepare
from d2distill.detection.draw import draw_detections

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "det"


def entries(output: str, seeds: list[int], opts: list[str]) -> list[Entry]:
    teacher = Entry("teacher", str(CONFIGS / "digits_r18.yaml"), [0], opts)
    weights = ["TEACHER.MODEL.WEIGHTS", str(teacher.folders(output)[0] / "student_final.pth")]
    return [
        teacher,
        Entry("student alone", str(CONFIGS / "digits_r50_narrow.yaml"), seeds, opts),
        Entry("distilled", str(CONFIGS / "review_dkd_digits_r18_r50_narrow.yaml"), seeds, [*opts, *weights]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/demo_det", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the students (default: %(default)s)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings of all runs")
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    rows = entries(args.output, args.seeds, args.opts)
    print("1/4: drawing 500 pictures of digits, or finding them in DETECTRON2_DATASETS", flush=True)
    prepare("digits_coco")
    print("2/4: the teacher learns from 400 of them, and so do the students alone", flush=True)
    run_all(rows[:2], args.output, args.processes)
    print("3/4: the same students learn from the same pictures and the teacher", flush=True)
    run_all(rows[2:], args.output, args.processes)
    print("4/4: drawing what they find", flush=True)
    picture = Path(args.output, "detections.png")
    titles = [f"{row.label}\nAP {results_of(row, args.output)[0]['bbox/AP']:.1f}" for row in rows]
    draw_detections(rows, titles, args.output, picture)
    results = table(rows, args.output)
    Path(args.output, "results.md").write_text(results + "\n")
    print(f"\nAverage precisions on 100 pictures, in percent:\n\n{results}\n\nDetections (seed 0): {picture}")


if __name__ == "__main__":
    run_cli(main)
