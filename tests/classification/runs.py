"""Small runs of the classification trainer for the tests, and what must be equal between two of them.

As a program it trains and is killed: `python -m tests.classification.runs FOLDER WORKERS MOMENT STEP`.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch
from detectron2.engine import HookBase

from classification.config import get_cfg, validate
from classification.trainer import ClassificationTrainer, load_datasets, train
from common.config import CfgNode
from common.engine import checkpoint

# 3 steps an epoch (16 + 16 + 8 samples), 3 epochs.
STEPS, EPOCH = 9, 3
TIMES = ("time", "data_time", "eta_seconds", "rank_data_time")


def small_cfg(folder, workers=0, **settings) -> CfgNode:
    """A run with a teacher on 40 digits: 9 steps, a checkpoint each epoch and after step 5."""
    cfg = get_cfg()
    opts = {
        "OUTPUT_DIR": str(folder),
        "SEED": 3,
        "LOG_PERIOD": 2,
        "MODEL.DEVICE": "cpu",
        "MODEL.STUDENT.NAME": "resnet8",
        "MODEL.TEACHER.NAME": "wrn_16_1",
        "DISTILL.METHODS": ["KD", "DKD"],
        "DISTILL.DKD.WARMUP": 2,
        "DATASETS.NAME": "digits",
        "DATASETS.TRAIN_SIZE": 40,
        "SOLVER.EPOCHS": 3,
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.STEPS": [2],
        "SOLVER.CHECKPOINT_STEPS": 5,
        "DATALOADER.NUM_WORKERS": workers,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    cfg.merge_from_list([item for pair in opts.items() for item in pair])
    validate(cfg)
    return cfg


def run(cfg: CfgNode, resume: bool = False) -> dict[str, float]:
    return train(cfg, argparse.Namespace(resume=resume, config_file=""))


def state(folder) -> tuple[dict, dict, list]:
    """The final student, the last checkpoint without times, and the log without times."""
    student = torch.load(Path(folder, "student_final.pth"), weights_only=True)["model"]
    last = torch.load(Path(folder, f"model_{STEPS:07d}.pth"), weights_only=True)
    del last["trainer"]["seconds"]
    lines = [json.loads(line) for line in Path(folder, "metrics.json").read_text().splitlines()]
    return student, last, [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_identical(one, two) -> None:
    """Equal to the last bit, tensors included."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_identical(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_identical(a, b)
    else:
        assert one == two


class KillHook(HookBase):
    """SIGKILL after the given step, before or after the other hooks saw it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _main(folder: str, workers: str, moment: str, step: str) -> None:
    torch.set_num_threads(2)
    cfg = small_cfg(folder, int(workers))
    trainer = ClassificationTrainer(cfg, *load_datasets(cfg))
    kill = KillHook(int(step))
    kill.trainer = trainer
    if moment == "before hooks":
        trainer._hooks.insert(0, kill)
    elif moment == "before saving":
        # run() registers the writer and the checkpoint hook together: slip in between.
        register = trainer.register_hooks
        trainer.register_hooks = lambda hooks: register([hooks[0], kill, hooks[1]])
    elif moment == "while saving":
        replace = os.replace

        def die(source, target):
            if f"model_{int(step):07d}" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        checkpoint.os.replace = die
    elif moment == "after saving":
        register = trainer.register_hooks
        trainer.register_hooks = lambda hooks: register([*hooks, kill])
    elif moment == "slowly":
        step_once = trainer.run_step

        def slow() -> None:
            import time

            time.sleep(0.5)
            step_once()

        trainer.run_step = slow
    trainer.run()


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(exist_ok=True)
    _main(*sys.argv[1:])
