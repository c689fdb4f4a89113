"""Overhaul of feature distillation."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from d2distill.common.distillers._features import BatchNorm, FeatureDistiller, align
from d2distill.common.distillers._numerics import safe_mean, upcast
from d2distill.common.distillers.base import DISTILLERS
from d2distill.common.outputs import Batch, NetworkInfo, Outputs, TrainingData

__all__ = ["OFD", "ofd_loss", "ofd_margin"]

#: Under which name the teacher provides its maps.
_MAPS = "maps under batch statistics"


def ofd_loss(feats_student: list[Tensor], feats_teacher: list[Tensor], margins: Sequence[Tensor]) -> Tensor:
    """Partial L2 distance to the teacher's pre-activations under a margin ReLU.

    Heo et al.: A Comprehensive Overhaul of Feature Distillation, ICCV 2019, arXiv:1904.01866.

        sum over the n maps i of 2^(i + 1 - n) * mean over samples of sum of (s - t')^2 [s > t' or t' > 0],
        t' = max(t, margin)

    so a student that is below a negative target has nothing to learn there. A teacher's map of another size is
    average-pooled to the student's (one that is smaller is repeated): the sum is over the student's pixels.

    Args:
        feats_student: list of (N, C, H, W), after the connectors.
        feats_teacher: list of the same length of (N, C, H, W), before the ReLU.
        margins: one (C,) each, see :func:`ofd_margin`.
    """
    total = 0.0
    for i, (student, teacher, margin) in enumerate(zip(feats_student, feats_teacher, margins, strict=True)):
        student, teacher = upcast(student), upcast(teacher).detach()
        if student.shape[2:] != teacher.shape[2:]:
            teacher = F.adaptive_avg_pool2d(teacher, student.shape[2:])
        teacher = torch.maximum(teacher, upcast(margin).view(1, -1, 1, 1))
        error = (student - teacher).square() * ((student > teacher) | (teacher > 0))
        total = total + safe_mean(error.flatten(1).sum(1)) / 2 ** (len(feats_student) - 1 - i)
    return total


def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """Expected value of what a ReLU cuts off a batch norm's output: E[x | x < 0] for x ~ N(bias, weight^2).

    Where hardly anything is negative (a probability of 1e-3 or less) it is -3 |weight|.

    Args:
        weight, bias: (C,), of the batch norm; a weight may be negative.

    Returns:
        (C,), at most 0.
    """
    mean = bias.detach().double()
    std = weight.detach().double().abs()
    ratio = mean / std.clamp_min(torch.finfo(torch.float64).tiny)
    negative = torch.special.ndtr(-ratio)
    expected = mean - std * torch.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi) / negative
    return torch.where(negative > 1e-3, expected, -3 * std).to(upcast(bias).dtype)


def maps_under_batch_statistics(network: nn.Module, images: Tensor, part: str) -> list[Tensor]:
    """`part` of the network's outputs, its batch norms using the batch's statistics, their running ones unchanged."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        return getattr(network.outputs(images), part)
    finally:
        for norm, (training, track) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, track


def _connector(channels_student: int, channels_teacher: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_student, channels_teacher, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, BatchNorm(channels_teacher))


@DISTILLERS.register()
class OFD(FeatureDistiller):
    """`ofd_loss` on the stages before their last ReLU, the student's through 1x1 connectors.

    A network without pre-activations is compared at its feature maps. The teacher's batch norms use the batch's
    statistics, as in the authors' code: a second pass of the teacher where other methods need one as well. Margins come
    from these batch norms as they are at construction: load the weights before.

    Raises:
        ValueError: the teacher names no batch norms before its ReLUs, or ones that do not fit its maps.
    """

    def build(self, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData) -> None:
        super().build(student, teacher, data)
        norms = getattr(teacher.module, "bn_before_relu", None)
        if not norms:
            raise ValueError(
                f"{self.name} takes its margins from the teacher's batch norms before a ReLU (its attribute "
                "bn_before_relu), but this teacher names none; models of timm and torchvision never do"
            )
        self.student_maps = "feats" if student.preacts is None else "preacts"
        self.teacher_maps = "feats" if teacher.preacts is None else "preacts"
        self.student_needs, self.teacher_needs = {self.student_maps}, set()
        self.teacher_extras = {_MAPS: partial(maps_under_batch_statistics, part=self.teacher_maps)}
        stages = align(*super().select_pairs(student, teacher), norms)
        self.connectors = nn.ModuleList()
        for i, (student_shape, teacher_shape, norm) in enumerate(zip(*stages, strict=True)):
            if norm.num_features != teacher_shape[0]:
                raise ValueError(
                    f"{self.name}: the teacher's batch norm {i} has {norm.num_features} channels, "
                    f"but its map {teacher_shape[0]}"
                )
            self.connectors.append(_connector(student_shape[0], teacher_shape[0]))
            # Without affine parameters a batch norm's output is N(0, 1).
            weight = torch.ones(norm.num_features) if norm.weight is None else norm.weight
            bias = torch.zeros(norm.num_features) if norm.bias is None else norm.bias
            self.register_buffer(f"margin{i}", ofd_margin(weight, bias), persistent=False)

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {"WEIGHT": 1e-3}

    @property
    def margins(self) -> list[Tensor]:
        """(C,) per compared map."""
        return [getattr(self, f"margin{i}") for i in range(len(self.connectors))]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return super().forward(student, Outputs(**{self.teacher_maps: teacher.extras[_MAPS]}), batch)

    def feature_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        # The teacher may name fewer batch norms than it has stages.
        margins, feats_student, feats_teacher = align(self.margins, feats_student, feats_teacher)
        connected = [connector(feat) for connector, feat in zip(self.connectors, feats_student, strict=True)]
        return ofd_loss(connected, feats_teacher, margins)
