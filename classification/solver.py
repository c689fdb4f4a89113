"""Optimisers and learning-rate schedules by name."""

from collections.abc import Callable

import torch
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler, ParamScheduler
from torch import nn

from d2distill.common.engine.dot import DOT as DistillationOrientedTrainer

__all__ = ["OPTIMIZERS", "SCHEDULES", "build_lr_scheduler", "build_optimizer"]


def _sgd(model: nn.Module, solver: CfgNode) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        _trainable(model), solver.BASE_LR, solver.MOMENTUM, nesterov=solver.NESTEROV, weight_decay=solver.WEIGHT_DECAY
    )


def _adamw(model: nn.Module, solver: CfgNode) -> torch.optim.Optimizer:
    exempt = _exempt_from_decay(model)
    groups = [
        {"params": [p for p in _trainable(model) if p not in exempt], "weight_decay": solver.WEIGHT_DECAY},
        {"params": [p for p in _trainable(model) if p in exempt], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], solver.BASE_LR)


def _dot(model: nn.Module, solver: CfgNode) -> torch.optim.Optimizer:
    return DistillationOrientedTrainer(
        _trainable(model), solver.BASE_LR, solver.MOMENTUM, solver.DELTA, weight_decay=solver.WEIGHT_DECAY
    )


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _exempt_from_decay(model: nn.Module) -> set[nn.Parameter]:
    """As transformers are trained: biases, norms, and what a network names in ``no_weight_decay()``, as timm's do."""
    exempt = {p for p in model.parameters() if p.ndim <= 1}
    for module in model.modules():
        names = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        exempt |= {p for name, p in module.named_parameters() if name in names}
    return exempt


def _step(solver: CfgNode) -> ParamScheduler:
    steps = [step for step in solver.STEPS if step < solver.EPOCHS]
    values = [solver.GAMMA**i for i in range(len(steps) + 1)]
    return MultiStepParamScheduler(values, milestones=steps, num_updates=solver.EPOCHS)


def _cosine(solver: CfgNode) -> ParamScheduler:
    return CosineParamScheduler(1.0, 0.0)


#: Optimisers by SOLVER.OPTIMIZER.
OPTIMIZERS: dict[str, Callable[[nn.Module, CfgNode], torch.optim.Optimizer]] = {
    "SGD": _sgd,
    "AdamW": _adamw,
    "DOT": _dot,
}
#: Schedules by SOLVER.LR_SCHEDULE: the factor on BASE_LR over the whole training.
SCHEDULES: dict[str, Callable[[CfgNode], ParamScheduler]] = {"step": _step, "cosine": _cosine}


def build_optimizer(model: nn.Module, solver: CfgNode) -> torch.optim.Optimizer:
    """The optimiser SOLVER.OPTIMIZER over all trainable parameters.

    SGD and DOT decay all of them, as the literature on CNNs does; AdamW the matrices and kernels only, without
    tokens, positions and the like (``no_weight_decay()`` of a network).
    """
    return OPTIMIZERS[solver.OPTIMIZER](model, solver)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, solver: CfgNode, epoch_length: int) -> LRMultiplier:
    """The schedule SOLVER.LR_SCHEDULE, stepped once per step, with linear warm-up from 0.001 over WARMUP_EPOCHS."""
    schedule = SCHEDULES[solver.LR_SCHEDULE](solver)
    if solver.WARMUP_EPOCHS:
        schedule = WarmupParamScheduler(schedule, 0.001, min(solver.WARMUP_EPOCHS / solver.EPOCHS, 1.0))
    return LRMultiplier(optimizer, schedule, solver.EPOCHS * epoch_length)
