"""What must be equal between a run that was stopped and one that was not, and ways to stop one."""

import json
import os
import signal
import time
from pathlib import Path

import torch
from detectron2.engine import HookBase

from d2distill.common.engine import checkpoint
from d2distill.common.engine.trainer import Trainer

TIMES = ("time", "data_time", "eta_seconds", "rank_data_time", "images_per_second", "max_mem")


def read_state(folder, steps: int) -> tuple[dict, dict, list]:
    """The final student, the last checkpoint without times and settings, and the log without times."""
    student = torch.load(Path(folder, "student_final.pth"), weights_only=True)["model"]
    last = torch.load(Path(folder, f"model_{steps:07d}.pth"), weights_only=True)
    del last["trainer"]["seconds"], last["settings"]
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
        # NaN: a metric that is not defined on the data.
        assert one == two or (one != one and two != two)


class KillHook(HookBase):
    """SIGKILL after the given step, before or after the other hooks saw it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def disturb(trainer: Trainer, moment: str, step: int) -> None:
    """Let the run of `trainer` be killed at a moment of a step, or make it slow enough to be stopped by hand."""
    kill = KillHook(step)
    kill.trainer = trainer
    if moment == "before saving":
        trainer._hooks.insert(0, kill)
    elif moment == "while saving":
        replace = os.replace

        def die(source, target):
            if f"model_{step:07d}" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        checkpoint.os.replace = die
    elif moment == "after saving":
        trainer._hooks.insert(trainer._hooks.index(trainer.checkpointing) + 1, kill)
    elif moment == "after evaluating":
        trainer._hooks.insert(-1, kill)
    elif moment == "after writing":
        trainer._hooks.append(kill)
    elif moment == "slowly":
        step_once = trainer.run_step

        def slow() -> None:
            time.sleep(0.5)
            step_once()

        trainer.run_step = slow
    elif moment == "in evaluation":
        terminate_in_evaluation(trainer, step)


class BrokenBatches:
    """One batch, then an error."""

    def __init__(self, batches, error: Exception) -> None:
        self.batches = batches
        self.error = error

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        yield next(iter(self.batches))
        raise self.error


def fail_in_evaluation(trainer: Trainer, step: int, error: Exception) -> None:
    """An error, in this process alone, after the first batch of the evaluation after `step`."""
    evaluate = trainer.task.evaluate

    def failing(network, interruptible):
        broken = trainer.iter + 1 == step
        return evaluate(network, lambda batches: interruptible(BrokenBatches(batches, error) if broken else batches))

    trainer.task.evaluate = failing


def terminate_in_evaluation(trainer: Trainer, step: int) -> None:
    """SIGTERM to this process where the evaluation after `step` begins."""
    evaluate = trainer.task.evaluate

    def interrupted(network, interruptible):
        if trainer.iter + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(network, interruptible)

    trainer.task.evaluate = interrupted
