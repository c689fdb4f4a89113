#!/usr/bin/env python3
"""Train a classifier, alone or with a teacher.

python tools/train_cls.py --config-file configs/cls/cifar100_r32x4_r8x4_dkd.yaml
python tools/train_cls.py --config-file FILE --resume            # go on where the run folder's run stopped
python tools/train_cls.py --config-file FILE --eval-only MODEL.STUDENT.WEIGHTS student_best.pth
python tools/train_cls.py --config-file FILE SOLVER.BASE_LR 0.1  # any setting, as KEY VALUE
"""

from detectron2.engine import default_argument_parser

from d2distill.classification.config import load_cfg
from d2distill.classification.trainer import evaluate, train
from d2distill.common.engine.launch import command, launch


def main() -> None:
    args = default_argument_parser(epilog=__doc__).parse_args()
    cfg = load_cfg(args.config_file, args.opts)
    if args.eval_only:
        results = evaluate(cfg)
        print(f"{cfg.MODEL.STUDENT.WEIGHTS}: top-1 {results['top1']:.2f}, top-5 {results['top5']:.2f}")
    else:
        launch(train, args, cfg, args.resume)


if __name__ == "__main__":
    command(main)
