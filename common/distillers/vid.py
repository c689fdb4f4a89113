"""Variational information distillation."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2distill.common.distillers._features import FeatureDistiller, pool_pairs_to_smaller
from d2distill.common.distillers._numerics import safe_mean, upcast
from d2distill.common.distillers.base import DISTILLERS
from d2distill.common.outputs import NetworkInfo, TrainingData

__all__ = ["VID", "vid_loss"]


def vid_loss(mean_student: Tensor, feat_teacher: Tensor, variance: Tensor) -> Tensor:
    """Negative log-likelihood of the teacher's map under a Gaussian that the student predicts.

    Ahn et al.: Variational Information Distillation for Knowledge Transfer, CVPR 2019, arXiv:1904.05835.

        mean of ((mu - t)^2 / var + log var) / 2, without the constant; it may be negative

    Args:
        mean_student: mu, (N, C, H, W), the student's prediction.
        feat_teacher: (N, C, H, W).
        variance: (C,), positive.
    """
    error = upcast(mean_student) - upcast(feat_teacher).detach()
    variance = upcast(variance).view(1, -1, 1, 1)
    return safe_mean((error.square() / variance + variance.log()) / 2)


def _regressor(channels_student: int, channels_teacher: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_student, channels_teacher, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_teacher, channels_teacher, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_teacher, channels_teacher, 1, bias=False),
    )


@DISTILLERS.register()
class VID(FeatureDistiller):
    """Sum of `vid_loss` over the stages, the larger map of a pair average-pooled to the smaller.

    Means come from a regressor of three 1x1 convolutions, variances from ``softplus(log_scale) + EPS``, one per
    channel of the teacher; both are learned. INIT_VAR, which is above EPS, is the variance to begin with.
    """

    def build(self, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData) -> None:
        super().build(student, teacher, data)
        variance, eps = self.cfg.INIT_VAR, self.cfg.EPS
        if variance <= eps:
            raise ValueError(f"{self.name}: INIT_VAR ({variance}) has to be above EPS ({eps})")
        pairs = list(zip(*self.select_pairs(student, teacher), strict=True))
        self.regressors = nn.ModuleList(_regressor(s[0], t[0]) for s, t in pairs)
        inverse_softplus = math.log(math.expm1(variance - eps))
        self.log_scales = nn.ParameterList(torch.full((t[0],), inverse_softplus) for _, t in pairs)

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WEIGHT": 1.0,
            # Smallest variance.
            "EPS": 1e-5,
            # Variance to begin with.
            "INIT_VAR": 5.0,
        }

    def feature_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        pairs = pool_pairs_to_smaller(feats_student, feats_teacher)
        return sum(
            vid_loss(regressor(student), teacher, F.softplus(log_scale) + self.cfg.EPS)
            for (student, teacher), regressor, log_scale in zip(pairs, self.regressors, self.log_scales, strict=True)
        )
