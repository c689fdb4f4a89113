"""Attention transfer."""

from typing import Any

from fvcore.common.config import CfgNode
from torch import Tensor

from d2distill.common.distillers._features import FeatureDistiller, pool_pairs_to_smaller
from d2distill.common.distillers._numerics import element_mean, l2_normalize
from d2distill.common.distillers.base import DISTILLERS
from d2distill.common.outputs import NetworkInfo, Outputs, TrainingData

__all__ = ["AT", "at_loss"]


def at_loss(feats_student: list[Tensor], feats_teacher: list[Tensor], p: float = 2) -> Tensor:
    """Distance of the normalised spatial attention maps.

    Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928.

        sum over maps of mean((a_s - a_t)^2),  a = A / ||A||_2 per sample,  A = mean over channels of |feat|^p

    The larger map of a pair is average-pooled to the smaller; the channels may differ.

    Args:
        feats_student, feats_teacher: lists of the same length of (N, C, H, W).
        p: power of the activations, >= 1.

    Returns:
        0-d tensor; 0 for an empty batch. No gradient reaches the teacher.

    Raises:
        ValueError: lists of different length.
    """

    def attention(feats: Tensor) -> Tensor:
        return l2_normalize(feats.abs().pow(p).mean(1).flatten(1), dim=1)

    return sum(
        element_mean((attention(s) - attention(t)).square())
        for s, t in pool_pairs_to_smaller(feats_student, feats_teacher)
    )


@DISTILLERS.register()
class AT(FeatureDistiller):
    """`at_loss` on the stages.

    Of networks with different numbers of stages ALIGN "deep" pairs the last ones, which are of one size; "shallow" the
    first ones, with which results of such pairs were published.

    Raises:
        ValueError: an unknown ALIGN.
    """

    def __init__(
        self, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData | None = None
    ) -> None:
        super().__init__(cfg, student, teacher, data)
        if cfg.ALIGN not in ("deep", "shallow"):
            raise ValueError(f'{self.name}: ALIGN is "deep" or "shallow", but was given {cfg.ALIGN!r}')

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        return {"WEIGHT": 1000.0, "P": 2.0, "ALIGN": "deep"}

    def select_pairs(
        self, student: Outputs | NetworkInfo, teacher: Outputs | NetworkInfo
    ) -> tuple[list[Any], list[Any]]:
        if self.cfg.ALIGN == "deep":
            return super().select_pairs(student, teacher)
        pairs = zip(student.feats[self.cfg.FIRST :], teacher.feats[self.cfg.FIRST :], strict=False)
        maps_student, maps_teacher = zip(*pairs, strict=True)
        return list(maps_student), list(maps_teacher)

    def feature_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        return at_loss(feats_student, feats_teacher, self.cfg.P)
