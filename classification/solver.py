"""Optimizers and learning-rate schedules by name."""

import math

import torch
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from torch import nn

from d2distill.common.engine.dot import DOT

__all__ = ["OPTIMIZERS", "PRECISIONS", "SCHEDULES", "build_lr_scheduler", "build_optimizer", "lowering_epochs"]

OPTIMIZERS = ("SGD", "AdamW", "DOT")
SCHEDULES = ("step", "cosine")
#: Precisions of autocast by SOLVER.AMP.
PRECISIONS = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_optimizer(model: nn.Module, solver: CfgNode) -> torch.optim.Optimizer:
    """The optimizer SOLVER.OPTIMIZER over all trainable parameters.

    SGD and DOT decay all of them, as the literature on CNNs does; AdamW the matrices and kernels only, as transformers
    are trained: without biases, norms, and what a network names in ``no_weight_decay()``, as timm's do.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    # One kernel for all parameters, which reads fp16's loss scale on the GPU: nothing waits for it.
    fused = True if trainable[0].is_cuda else None
    rate, momentum, decay = solver.BASE_LR, solver.MOMENTUM, solver.WEIGHT_DECAY
    if solver.OPTIMIZER == "SGD":
        return torch.optim.SGD(trainable, rate, momentum, nesterov=solver.NESTEROV, weight_decay=decay, fused=fused)
    if solver.OPTIMIZER == "DOT":
        return DOT(trainable, rate, momentum, solver.DELTA, weight_decay=decay)
    exempt = {p for p in trainable if p.ndim <= 1}
    for module in model.modules():
        names = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        exempt |= {p for name, p in module.named_parameters() if name in names}
    groups = [
        {"params": [p for p in trainable if p not in exempt], "weight_decay": decay},
        {"params": [p for p in trainable if p in exempt], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], rate, fused=fused)


def lowering_epochs(solver: CfgNode) -> list[int]:
    """The epochs after which SOLVER.STEPS lower the learning rate; shares of the run count up to whole epochs."""
    return [math.ceil(step * solver.EPOCHS if step < 1 else step) for step in solver.STEPS]


def build_lr_scheduler(optimizer: torch.optim.Optimizer, solver: CfgNode, epoch_length: int) -> LRMultiplier:
    """The schedule SOLVER.LR_SCHEDULE, stepped once per step, with linear warm-up from 0.001 over WARMUP_EPOCHS."""
    if solver.LR_SCHEDULE == "cosine":
        schedule = CosineParamScheduler(1.0, 0.0)
    else:
        # In a short run several may fall into one epoch.
        epochs = [epoch for epoch in lowering_epochs(solver) if epoch < solver.EPOCHS]
        ends = sorted(set(epochs))
        values = [solver.GAMMA ** sum(epoch <= end for epoch in epochs) for end in (0, *ends)]
        schedule = MultiStepParamScheduler(values, milestones=ends, num_updates=solver.EPOCHS)
    if solver.WARMUP_EPOCHS:
        schedule = WarmupParamScheduler(schedule, 0.001, min(solver.WARMUP_EPOCHS / solver.EPOCHS, 1.0))
    return LRMultiplier(optimizer, schedule, solver.EPOCHS * epoch_length)
