#!/usr/bin/env python3
"""Convert weights of detectors; the outputs (.pth or .safetensors) hold nothing but tensors.

python tools/convert_weights.py backbone torchvision:ResNet18_Weights.IMAGENET1K_V1 r18.pth
python tools/convert_weights.py safe detectron2://COCO-Detection/faster_rcnn_R_101_FPN_3x/137851257/\
model_final_f6e8b1.pkl r101.pth
python tools/convert_weights.py merge r18.pth r101.pth r101_r18.pth
python tools/convert_weights.py split r101_r18.pth r18.pth r101.pth

Every source is a path, an https:// or detectron2:// URL, torchvision:WEIGHTS or timm:NAME.
"""

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import require_detectron2


def main() -> None:
    parser = CommandParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, convert, text, names in (
        ("backbone", "convert_to_tensors", "a classifier of torchvision or timm, as MODEL.WEIGHTS", ("SOURCE", "OUT")),
        ("safe", "convert_to_tensors", "a pickle (.pkl), as tensors without code", ("SOURCE", "OUT")),
        ("merge", "merge", "a student and a teacher, as one file", ("STUDENT", "TEACHER", "OUT")),
        ("split", "split", "such a file, as two files", ("MERGED", "STUDENT_OUT", "TEACHER_OUT")),
    ):
        sub = actions.add_parser(action, help=text, description=text)
        for name in names:
            sub.add_argument(name)
        sub.add_argument("--force", action="store_true", help="replace files that exist")
        sub.set_defaults(convert=convert, names=names)
    args = parser.parse_args()
    require_detectron2()
    from d2distill.detection import convert

    written = getattr(convert, args.convert)(*(getattr(args, name) for name in args.names), force=args.force)
    print(written if isinstance(written, str) else "\n".join(written))


if __name__ == "__main__":
    run_cli(main)
