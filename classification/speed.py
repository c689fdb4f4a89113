"""How the networks of a training run on their device: memory format, and which of them are compiled."""

import logging

import torch
from detectron2.utils import comm
from torch import nn

from d2distill.classification.modeling import DistillModel
from d2distill.common.config import CfgNode, resolve_device
from d2distill.common.engine.compiling import CompiledOrEager, TrainedNetwork
from d2distill.common.modules import MODULE_PREFIX

__all__ = ["networks_to_compile", "prepare_networks", "replays_steps", "rows_at_a_time"]

logger = logging.getLogger("detectron2.d2distill")
# From these on "auto" compiles the teacher. It takes about a minute, and saves a third of the teacher's time or more:
# on one core, which does some 3e10 multiply-adds a second, four minutes; on a GPU milliseconds of each step.
_MIN_MULTIPLY_ADDS_ON_CPU = 2e13
_MIN_STEPS_ON_GPU = 20_000


def networks_to_compile(model: DistillModel, cfg: CfgNode, steps: int) -> set[str]:
    """Which of ``student`` and ``teacher`` a training of `steps` steps compiles, by SOLVER.COMPILE.

    A function of the settings and the networks alone: a resumed run computes what an unbroken one would.
    """
    if cfg.SOLVER.COMPILE == "auto":
        return {"teacher"} if model.teacher is not None and _pays_off(model.teacher, cfg, steps) else set()
    chosen = {"": set(), "teacher": {"teacher"}, "all": {"student", "teacher"}}[cfg.SOLVER.COMPILE]
    return chosen - ({"teacher"} if model.teacher is None else set())


def _pays_off(teacher: nn.Module, cfg: CfgNode, steps: int) -> bool:
    device = next(teacher.parameters()).device
    if device.type != "cpu":
        return steps >= _MIN_STEPS_ON_GPU
    from torch.utils.flop_counter import FlopCounterMode

    networks = teacher if isinstance(teacher, nn.ModuleList) else [teacher]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for network in networks:
            network.eval()(torch.zeros(1, 3, cfg.INPUT.SIZE, cfg.INPUT.SIZE))
    return counter.get_total_flops() / 2 * steps * cfg.SOLVER.IMS_PER_BATCH >= _MIN_MULTIPLY_ADDS_ON_CPU


def rows_at_a_time(cfg: CfgNode) -> int:
    """Images of one pass of a training in this process: of a whole batch, or of a part where it is accumulated."""
    return -(-cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size() // cfg.SOLVER.ACCUMULATE)


def prepare_networks(model: DistillModel, cfg: CfgNode, steps: int) -> None:
    """Give the networks of a model on its device the memory format of SOLVER.MEMORY_FORMAT, and compile those that are
    to be, which happens in their first step."""
    solver, device = cfg.SOLVER, next(model.parameters()).device
    # Tensor cores take half precision in this format; elsewhere it gains little, or loses.
    suits = device.type == "cuda" and solver.AMP != ""
    if solver.MEMORY_FORMAT == "channels_last" or (solver.MEMORY_FORMAT == "auto" and suits):
        # The images and maps of a network follow its weights.
        model.student.to(memory_format=torch.channels_last)
        if model.teacher is not None:
            model.teacher.to(memory_format=torch.channels_last)
    chosen, rows = networks_to_compile(model, cfg, steps), rows_at_a_time(cfg)
    if chosen:
        names = " and the ".join(sorted(chosen))
        logger.info(
            f"SOLVER.COMPILE {solver.COMPILE}: the first step compiles the {names}, which takes a minute or more"
        )
    if "teacher" in chosen:
        model.teacher_source.compile(rows)
    if "student" in chosen:
        _compile_student(model, solver, rows)
    if solver.CUDA_GRAPH and device.type == "cuda" and model.teacher_source is not None:
        model.teacher_source.replay(device)


def replays_steps(cfg: CfgNode) -> bool:
    """Whether a training's steps are replayed as a CUDA graph; the log says why not, where SOLVER.CUDA_GRAPH is set."""
    if not cfg.SOLVER.CUDA_GRAPH:
        return False
    reasons = {
        "it is for GPUs": resolve_device(cfg).type != "cuda",
        "several processes exchange gradients": comm.get_world_size() > 1,
        f"SOLVER.ACCUMULATE {cfg.SOLVER.ACCUMULATE} adds up gradients": cfg.SOLVER.ACCUMULATE > 1,
        "SOLVER.OPTIMIZER DOT keeps two gradients": cfg.SOLVER.OPTIMIZER == "DOT",
    }
    reason = next((text for text, holds in reasons.items() if holds), "")
    if reason:
        logger.warning(f"SOLVER.CUDA_GRAPH: the step is not replayed: {reason}")
    return not reason


def _compile_student(model: DistillModel, solver: CfgNode, rows: int) -> None:
    inner = sorted(need for need in model.student_needs if need.startswith(MODULE_PREFIX))
    reason = f"a method reads {', '.join(inner)}" if inner else ""
    if solver.OPTIMIZER == "DOT":
        reason = "SOLVER.OPTIMIZER DOT runs two backward passes through it"
    if reason:
        logger.info(f"The student runs eagerly: {reason}, which a compiled network cannot give")
        return
    parts = {"logits", *model.student_needs}
    compiled = TrainedNetwork(model.student, parts, rows)
    model.compiled_student = CompiledOrEager("The student", compiled, model.student.outputs)
