"""Distillation of feature maps by their correlation."""

from torch import Tensor

from d2distill.common.distillers._features import LevelDistiller, resize_pairs_to_teacher
from d2distill.common.distillers._numerics import safe_mean, standardize
from d2distill.common.distillers.base import DISTILLERS

__all__ = ["PKD", "pkd_loss"]


def pkd_loss(feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
    """Half the mean squared difference of standardized maps, that is, one minus their Pearson correlation.

    Cao et al.: PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient,
    NeurIPS 2022, arXiv:2207.02039.

        sum over levels of mean((n(s) - n(t))^2) / 2,   n: zero mean and unit deviation per channel over (N, H, W)

    Args:
        feats_student, feats_teacher: lists of maps (N, C, H, W) of equal channels. Of lists of different length the
            deepest entries are compared; a student map of another size is interpolated to the teacher's.
    """
    pairs = resize_pairs_to_teacher(feats_student, feats_teacher)
    standardized = ([standardize(maps, (0, 2, 3), eps=1e-6) for maps in pair] for pair in pairs)
    return sum(safe_mean((student - teacher).square()) / 2 for student, teacher in standardized)


@DISTILLERS.register()
class PKD(LevelDistiller):
    """`pkd_loss` on feature maps. WEIGHT is that of two-stage detectors; one-stage ones take 10."""

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {"WEIGHT": 6.0}

    def feature_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        return pkd_loss(self.connected(feats_student), feats_teacher)
