"""A trainer of next to nothing, to test what is around a step."""

from pathlib import Path

import torch
from detectron2.solver import LRMultiplier
from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import LinearParamScheduler

from d2distill.common.engine.task import Task
from d2distill.common.engine.trainer import Trainer


class Tiny(torch.nn.Module):
    """One weight of 1; `losses(batch, weight)` makes the losses."""

    def __init__(self, losses=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.losses = losses or (lambda batch, weight: {"loss": weight * batch})

    def forward(self, batch):
        return self.losses(batch, self.weight)


def tiny_trainer(
    folder, losses=None, max_iter=4, seed=0, evaluate=None, ema_decay=0.0, accumulate=1, loggers=(), report=None, **task
) -> Trainer:
    """A trainer whose batches are the numbers 0, 1, ...; SGD with learning rate 0.1."""
    Path(folder).mkdir(exist_ok=True)
    model = Tiny(losses)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    solver = {"CHECKPOINT_KEEP": 2, "EMA_DECAY": ema_decay, "ACCUMULATE": accumulate}
    cfg = CfgNode({"OUTPUT_DIR": str(folder), "SEED": seed, "LOG_PERIOD": 2, "SOLVER": solver})
    cfg.LOGGERS, cfg.REPORT = [*loggers], CfgNode({"ENABLED": report is not None, "BASELINE": report or ""})
    settings = {
        "model": model,
        "wrapped": model,
        "optimizer": optimizer,
        "lr_scheduler": LRMultiplier(optimizer, LinearParamScheduler(1.0, 1.0), max_iter),
        "build_batches": lambda start: iter(range(start, max_iter)),
        "deployed_student": lambda: model,
        "evaluate": evaluate or (lambda network, interruptible: {"top1": 0.0}),
        "best_metric": "top1",
        "max_iter": max_iter,
        "eval_period": max_iter,
        "checkpoint_periods": [max_iter],
        "may_change": (),
        "run_identity": {},
        **task,
    }
    return Trainer(cfg, Task(**settings))
