"""Distillation of feature maps by their correlation."""

import torch
from torch import Tensor

from d2distill.common.distillers._levels import LevelDistiller, resize_pairs_to_teacher
from d2distill.common.distillers._numerics import zero_mean
from d2distill.common.distillers.base import DISTILLERS

__all__ = ["PKD", "pkd_loss"]


def _standardize(maps: Tensor, eps: float = 1e-6) -> Tensor:
    """Each channel with zero mean and unit unbiased deviation over batch and space; a constant one becomes 0."""
    difference = zero_mean(maps, (0, 2, 3))
    # The norm's gradient is 0 for a constant channel; that of a square root would be infinite.
    norm = torch.linalg.vector_norm(difference, dim=(0, 2, 3), keepdim=True)
    return difference / (norm / max(maps[:, 0].numel() - 1, 1) ** 0.5 + eps)


def pkd_loss(feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
    """Half the mean squared difference of standardised maps, that is, one minus their Pearson correlation.

    Cao et al.: PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient,
    NeurIPS 2022, arXiv:2207.02039.

        sum over levels of mean((n(s) - n(t))^2) / 2,   n: zero mean and unit deviation per channel over (N, H, W)

    Args:
        feats_student, feats_teacher: lists of maps (N, C, H, W), from shallow to deep. Of lists of different length
            the deepest entries are compared; a student map of another size is interpolated to the teacher's.

    Returns:
        0-d tensor; 0 for an empty batch. No gradient reaches the teacher.

    Raises:
        ValueError: maps of different channels.
    """
    return sum(
        (_standardize(student) - _standardize(teacher)).square().sum() / max(student.numel(), 1) / 2
        for student, teacher in resize_pairs_to_teacher(feats_student, feats_teacher)
    )


@DISTILLERS.register()
class PKD(LevelDistiller):
    """`pkd_loss` on feature maps. WEIGHT is that of two-stage detectors; one-stage ones take 10."""

    @classmethod
    def defaults(cls) -> dict[str, float]:
        return {"WEIGHT": 6.0}

    def feature_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        return pkd_loss(feats_student, feats_teacher)
