#!/usr/bin/env python3
"""Accuracy of one checkpoint on a data set's test split.

python tools/eval_cls.py -m resnet32x4 -d cifar100 -c CKPT
python tools/eval_cls.py -m torchvision:resnet34 -d imagenet -c torchvision:ResNet34_Weights.IMAGENET1K_V1
"""

import argparse

from d2distill.classification.config import load_cfg
from d2distill.classification.trainer import evaluate
from d2distill.common.engine.launch import command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, help="a model of the zoo, timm:NAME or torchvision:NAME")
    parser.add_argument("-d", "--dataset", default="cifar100", help="a data set (default: cifar100)")
    parser.add_argument("-c", "--ckpt", required=True, help="path or URL of its weights")
    parser.add_argument("-bs", "--batch-size", type=int, default=64)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="any other setting, as KEY VALUE")
    args = parser.parse_args()
    settings = ["DATASETS.NAME", args.dataset, "MODEL.STUDENT.NAME", args.model, "MODEL.STUDENT.WEIGHTS", args.ckpt]
    cfg = load_cfg("", [*settings, "TEST.IMS_PER_BATCH", args.batch_size, *args.opts])
    results = evaluate(cfg)
    print(f"{args.model} on {args.dataset}: top-1 {results['top1']:.2f}, top-5 {results['top5']:.2f}")


if __name__ == "__main__":
    command(main)
