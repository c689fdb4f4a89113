"""Neuron selectivity transfer."""

from torch import Tensor

from d2distill.common.distillers._features import FeatureDistiller, pool_pairs_to_smaller
from d2distill.common.distillers._numerics import l2_normalize, no_autocast
from d2distill.common.distillers.base import DISTILLERS

__all__ = ["NST", "nst_loss"]


def nst_loss(feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
    """Maximum mean discrepancy of the channels' activation patterns under a squared inner product.

    Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, arXiv:1707.01219.

        sum over maps of mean K(t, t) + mean K(s, s) - 2 mean K(s, t),  K(a, b)_nij = <a_ni, b_nj>^2

    with every channel L2-normalized over space and means over samples and pairs of channels. The larger map of a
    pair is average-pooled to the smaller; the channels may differ.

    Args:
        feats_student, feats_teacher: lists of the same length of (N, C, H, W).
    """

    def kernel_mean(a: Tensor, b: Tensor) -> Tensor:
        # Two ways to the same sum: N x C x C numbers are too many where there are more channels than positions.
        if a.shape[2] < min(a.shape[1], b.shape[1]):
            total = ((a.mT @ a) * (b.mT @ b)).sum()
        else:
            total = (a @ b.mT).square().sum()
        return total / max(a.shape[0] * a.shape[1] * b.shape[1], 1)

    total = 0.0
    with no_autocast(feats_student[0]):
        for pair in pool_pairs_to_smaller(feats_student, feats_teacher):
            s, t = (l2_normalize(feats.flatten(2), dim=2) for feats in pair)
            total = total + kernel_mean(t, t) + kernel_mean(s, s) - 2 * kernel_mean(s, t)
    return total


@DISTILLERS.register()
class NST(FeatureDistiller):
    """`nst_loss` on the stages."""

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {"WEIGHT": 50.0}

    def feature_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        return nst_loss(feats_student, feats_teacher)
