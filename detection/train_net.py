#!/usr/bin/env python3
"""Train a detector, alone or with a teacher.

python detection/train_net.py --config-file configs/det/dkd_r101_r18.yaml --num-gpus 8
python detection/train_net.py --config-file FILE --resume                 # go on where the run folder's run stopped
python detection/train_net.py --config-file FILE --eval-only MODEL.WEIGHTS student_best.pth
python detection/train_net.py --config-file FILE SOLVER.BASE_LR 0.02      # any setting, as KEY VALUE
"""

from detectron2.engine import default_argument_parser

from d2distill.common.engine.launch import command, launch
from d2distill.detection.config import load_cfg
from d2distill.detection.trainer import evaluate, train


def main() -> None:
    args = default_argument_parser(epilog=__doc__).parse_args()
    cpu = ["MODEL.DEVICE", "cpu"] if args.num_gpus == 0 else []
    cfg = load_cfg(args.config_file, cpu + args.opts)
    launch(*((evaluate, args, cfg) if args.eval_only else (train, args, cfg, args.resume)))


if __name__ == "__main__":
    command(main)
