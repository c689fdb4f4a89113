#!/usr/bin/env python3
"""Accuracy and time of INPUT.REPLAY_EPOCHS K on Fashion-MNIST: KD of resnet8 with wrn_16_2, at 16x16, augmented anew.

    python benchmarks/replay.py                            # 7,000 images, 30 epochs, two seeds: minutes on two cores
    python benchmarks/replay.py --epochs 4 --images 500    # to try it
    python benchmarks/replay.py --mixup 0.2 --seeds 0 1 2

K = 0 is the training without replay, whose teacher runs in each step. The rows with replay have a folder of teacher
outputs (MODEL.TEACHER.CACHE) each: the first seed's run fills it, and those of the later seeds find it full, but for
mixup, where every seed mixes other images. Each run has one core. Interrupted, the command continues where it was.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch
from tabulate import tabulate

from d2distill.common.engine.cli import run_cli
from d2distill.tools.comparison import CLASSIFICATION, ROOT, Comparison, Entry, mean_std

CONFIG = str(ROOT / "configs" / "cls" / "base_cifar100.yaml")


def rows(args: argparse.Namespace, output: Path) -> list[Entry]:
    """The teacher, and the student with each K."""
    common = {
        "DATASETS.NAME": "fashion_mnist",
        "DATASETS.TRAIN_SIZE": args.images,
        "INPUT.SIZE": 16,
        "INPUT.AUGMENTATION": "rotate_flip",
        "SOLVER.EPOCHS": args.epochs,
        "SOLVER.LR_SCHEDULE": "cosine",
        "TEST.EVAL_PERIOD": args.epochs,
        "DATALOADER.NUM_WORKERS": 0,
        "REPORT.ENABLED": False,
        "LOGGERS": [],
    }
    student = {"MODEL.STUDENT.NAME": "resnet8", "MODEL.TEACHER.NAME": "wrn_16_2", "DISTILL.METHODS": ["KD"]}
    if args.mixup:
        student["INPUT.MIXUP"] = args.mixup
    half = {"SOLVER.EPOCHS": max(args.epochs // 2, 1), "TEST.EVAL_PERIOD": max(args.epochs // 2, 1)}
    teacher = Entry("teacher", CONFIG, [0], settings({**common, **half, "MODEL.STUDENT.NAME": "wrn_16_2"}))
    found = [teacher]
    for epochs in args.replay:
        own = {"INPUT.REPLAY_EPOCHS": epochs, "MODEL.TEACHER.CACHE": str(output / f"cache_{epochs}")} if epochs else {}
        found.append(Entry(f"{epochs}", CONFIG, args.seeds, settings({**common, **student, **own}), teacher))
    return found


def settings(values: dict) -> list[str]:
    return [str(item) for pair in values.items() for item in pair]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replay", type=int, nargs="+", default=[0, 2, 5, 10], metavar="K", help="(default: 0 2 5 10)")
    parser.add_argument("--epochs", type=int, default=30, help="of the student (default: %(default)s)")
    parser.add_argument("--images", type=int, default=7000, help="of the 60,000 for training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    parser.add_argument("--mixup", type=float, default=0.0, help="alpha (default: none)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each (default: %(default)s)")
    parser.add_argument("--output", default="output/replay", help="of the runs (default: %(default)s)")
    args = parser.parse_args()
    output = Path(args.output).absolute()
    entries = rows(args, output)
    # The first seed's runs first: those of others then find the files full.
    for seeds in ([seed] for seed in args.seeds):
        chosen = [Entry(e.label, e.config_file, seeds if e.teacher else e.seeds, e.opts, e.teacher) for e in entries]
        Comparison(CLASSIFICATION, chosen, output).run(args.jobs)
    comparison, lines, results = Comparison(CLASSIFICATION, entries, output), [], {}
    for entry in entries:
        runs = list(comparison.results(entry).values())
        seconds = [run["seconds"] for run in runs]
        results[entry.label] = {"top1": [run["top1"] for run in runs], "seconds": seconds}
        later = f"{statistics.mean(seconds[1:]):.0f} s" if seconds[1:] else ""
        top1 = mean_std([run["top1"] for run in runs])
        lines.append({"K": entry.label, "top-1 (%)": top1, "first seed": f"{seconds[0]:.0f} s", "later seeds": later})
    print(tabulate(lines, "keys", tablefmt="github", disable_numparse=True))
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    facts = {"arguments": vars(args), "machine": machine, "results": results}
    (output / "replay.json").write_text(json.dumps(facts, indent=2))
    print(f"The same, and each run's: {output / 'replay.json'}")


if __name__ == "__main__":
    run_cli(main)
