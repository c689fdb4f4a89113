"""What a task tells the trainer: everything in which classification and detection differ."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.solver import LRMultiplier
from fvcore.common.config import CfgNode
from torch import Tensor, nn

#: Put around the batches of an evaluation, which ends early where the job is to stop.
Interruptible = Callable[[Iterable[Any]], Iterable[Any]]


def _whole(batch: Any, step: int) -> list[tuple[Any, float]]:
    return [(batch, 1.0)]


@dataclass
class Task:
    """One training, ready to run.

    Attributes:
        model: what is trained; returns a dict of losses in training mode. Its state dict is saved.
        wrapped: what is called: `model` itself, or wrapped for several processes.
        optimizer, lr_scheduler: the latter is stepped once per training step.
        build_batches: called with the first step to do; returns the batches from that step on.
        deployed_student: the network that is evaluated, saved alone and exported.
        evaluate: metrics of such a network on the test split, larger is better, but for those named ``...loss``; empty
            on other ranks.
        best_metric: which of them decides which student is the best one.
        max_iter, eval_period, checkpoint_periods: in steps.
        may_change: patterns of the settings that may be others when a run is resumed; the rest makes another run.
        run_identity: what else must be the same: facts that no setting tells.
        epoch_length: in steps; 0 where there are no epochs.
        precision: of autocast; None trains in fp32. torch.float16 comes with loss scaling.
        clip_norm: largest norm of the gradient; 0 does not clip.
        prepare: changes each batch after the step's random numbers were seeded (mixup).
        split_batch: the parts in which a batch is run, and what the mean loss of each counts.
        backward: puts gradients where the optimizer finds them, in the place of ``sum(losses).backward()``.
        graph_inputs: makes of a part of a batch all that the model needs of the host, to replay steps as a CUDA graph;
            None: they are not replayed.
        evaluate_once: more metrics of the final student, taken after the training.
        model_stats: facts of a deployed network for results.json.
        description: of the deployed network, for student.json and the student's files: ``task``, ``network``,
            ``classes``, ``preprocess``, ``config`` and ``made_from``; see :func:`d2distill.load`.
        facts: what else results.json has, asked for after the last evaluation: ``per_class``, ``teacher_<metric>``.
        step_metrics: means over the images of the last (part of a) step, 0-d, that are logged like the losses.
        images_per_step: on average, over all processes; 0: not known.
        default_settings: the settings where nothing is set, for the report.
        report_parts: what report.html shows of the last evaluation and nothing else has; see :mod:`.report`.
        finite_outputs: whether each network's outputs were finite in the last step, 0-d, by its name; None: unknown.
        checkpointables: what else has a state to save.
    """

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: LRMultiplier
    build_batches: Callable[[int], Iterable[Any]]
    deployed_student: Callable[[], nn.Module]
    evaluate: Callable[[nn.Module, Interruptible], dict[str, float]]
    best_metric: str
    max_iter: int
    eval_period: int
    checkpoint_periods: list[int]
    may_change: tuple[str, ...]
    run_identity: Mapping[str, Any]
    epoch_length: int = 0
    precision: torch.dtype | None = None
    clip_norm: float = 0.0
    prepare: Callable[[Any], Any] | None = None
    split_batch: Callable[[Any, int], list[tuple[Any, float]]] = _whole
    backward: Callable[[dict[str, Tensor]], None] | None = None
    graph_inputs: Callable[[Any], Any] | None = None
    evaluate_once: Callable[[nn.Module], dict[str, float]] = lambda network: {}
    model_stats: Callable[[nn.Module], dict[str, float]] = lambda network: {}
    description: Callable[[], dict[str, Any]] = dict
    facts: Callable[[], dict[str, Any]] = dict
    step_metrics: Callable[[], Mapping[str, Tensor]] = dict
    images_per_step: float = 0.0
    default_settings: Callable[[], CfgNode] = CfgNode
    report_parts: Callable[[], dict[str, Any]] = dict
    finite_outputs: Callable[[], Mapping[str, Tensor | None]] = dict
    checkpointables: dict[str, Any] = field(default_factory=dict)
