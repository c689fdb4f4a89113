#!/usr/bin/env python3
"""Accuracy of one checkpoint on a data set's test split.

python tools/eval_cls.py -m resnet32x4 -d cifar100 -c CKPT
python tools/eval_cls.py -m torchvision:resnet34 -d imagenet -c torchvision:ResNet34_Weights.IMAGENET1K_V1
"""

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import require_detectron2


def main() -> None:
    """``d2distill-eval``."""
    run_cli(_main)


def _main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("-m", "--model", required=True, help="a model of the zoo, timm:NAME or torchvision:NAME")
    parser.add_argument("-d", "--dataset", default="cifar100", help="a data set (default: cifar100)")
    parser.add_argument("-c", "--ckpt", required=True, help="path or URL of its weights")
    parser.add_argument("--no-ema", action="store_true", help="of a file with averaged (EMA) weights take the others")
    parser.add_argument("-bs", "--batch-size", type=int, default=64)
    parser.add_settings()
    args = parser.parse_args()
    require_detectron2()
    from d2distill.classification.config import load_cfg

    settings = ["DATASETS.NAME", args.dataset, "MODEL.STUDENT.NAME", args.model, "MODEL.STUDENT.WEIGHTS", args.ckpt]
    settings += ["MODEL.STUDENT.USE_EMA", not args.no_ema]
    cfg = load_cfg("", [*settings, "TEST.IMS_PER_BATCH", args.batch_size, *args.opts])
    from d2distill.classification.trainer import evaluate

    results = evaluate(cfg)
    print(f"{args.model} on {args.dataset}: {', '.join(f'{name} {value:.2f}' for name, value in results.items())}")


if __name__ == "__main__":
    main()
