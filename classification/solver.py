"""Optimisers and learning-rate schedules by name."""

from collections.abc import Callable

import torch
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler, ParamScheduler
from torch import nn

from common.engine.dot import DOT as DistillationOrientedTrainer

__all__ = ["OPTIMIZERS", "SCHEDULES", "build_lr_scheduler", "build_optimizer"]


def _sgd(parameters: list[nn.Parameter], solver: CfgNode) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, solver.BASE_LR, solver.MOMENTUM, nesterov=solver.NESTEROV, weight_decay=solver.WEIGHT_DECAY
    )


def _adamw(parameters: list[nn.Parameter], solver: CfgNode) -> torch.optim.Optimizer:
    # As transformers are trained: biases, norms and tokens do not decay.
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": solver.WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], solver.BASE_LR)


def _dot(parameters: list[nn.Parameter], solver: CfgNode) -> torch.optim.Optimizer:
    return DistillationOrientedTrainer(
        parameters, solver.BASE_LR, solver.MOMENTUM, solver.DELTA, weight_decay=solver.WEIGHT_DECAY
    )


def _step(solver: CfgNode) -> ParamScheduler:
    steps = [step for step in solver.STEPS if step < solver.EPOCHS]
    values = [solver.GAMMA**i for i in range(len(steps) + 1)]
    return MultiStepParamScheduler(values, milestones=steps, num_updates=solver.EPOCHS)


def _cosine(solver: CfgNode) -> ParamScheduler:
    return CosineParamScheduler(1.0, 0.0)


#: Optimisers by SOLVER.OPTIMIZER.
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], CfgNode], torch.optim.Optimizer]] = {
    "SGD": _sgd,
    "AdamW": _adamw,
    "DOT": _dot,
}
#: Schedules by SOLVER.LR_SCHEDULE: the factor on BASE_LR over the whole training.
SCHEDULES: dict[str, Callable[[CfgNode], ParamScheduler]] = {"step": _step, "cosine": _cosine}


def build_optimizer(model: nn.Module, solver: CfgNode) -> torch.optim.Optimizer:
    """The optimiser SOLVER.OPTIMIZER over all trainable parameters.

    SGD and DOT decay all of them, as the literature on CNNs does; AdamW the matrices and kernels only.
    """
    return OPTIMIZERS[solver.OPTIMIZER]([p for p in model.parameters() if p.requires_grad], solver)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, solver: CfgNode, epoch_length: int) -> LRMultiplier:
    """The schedule SOLVER.LR_SCHEDULE, stepped once per step, with linear warm-up from 0.001 over WARMUP_EPOCHS."""
    schedule = SCHEDULES[solver.LR_SCHEDULE](solver)
    if solver.WARMUP_EPOCHS:
        schedule = WarmupParamScheduler(schedule, 0.001, min(solver.WARMUP_EPOCHS / solver.EPOCHS, 1.0))
    return LRMultiplier(optimizer, schedule, solver.EPOCHS * epoch_length)
