"""Attention transfer."""

from torch import Tensor

from d2distill.common.distillers._features import FeatureDistiller, pool_pairs_to_smaller
from d2distill.common.distillers._numerics import l2_normalize, safe_mean
from d2distill.common.distillers.base import DISTILLERS
from d2distill.common.outputs import NetworkInfo, Outputs, TrainingData

__all__ = ["AT", "at_loss"]


def at_loss(feats_student: list[Tensor], feats_teacher: list[Tensor], p: float = 2) -> Tensor:
    """Distance of the normalized spatial attention maps.

    Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928.

        sum over maps of mean((a_s - a_t)^2),  a = A / ||A||_2 per sample,  A = mean over channels of |feat|^p

    The larger map of a pair is average-pooled to the smaller; the channels may differ.

    Args:
        feats_student, feats_teacher: lists of the same length of (N, C, H, W).
        p: power of the activations, >= 1.
    """

    def attention(feats: Tensor) -> Tensor:
        return l2_normalize(feats.abs().pow(p).mean(1).flatten(1), dim=1)

    pairs = pool_pairs_to_smaller(feats_student, feats_teacher)
    return sum(safe_mean((attention(s) - attention(t)).square()) for s, t in pairs)


@DISTILLERS.register()
class AT(FeatureDistiller):
    """`at_loss` on the stages.

    Of networks with different numbers of stages ALIGN "deep" pairs the last ones, which are of one size; "shallow" the
    first ones, with which results of such pairs were published.
    """

    def build(self, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData) -> None:
        super().build(student, teacher, data)
        if self.cfg.ALIGN not in ("deep", "shallow"):
            raise ValueError(f'{self.name}: ALIGN is "deep" or "shallow", but was given {self.cfg.ALIGN!r}')

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WEIGHT": 1000.0,
            # Exponent p of the activations before the mean over channels.
            "P": 2.0,
            # Which stages are paired if their numbers differ: the last ("deep") or the first ("shallow").
            "ALIGN": "deep",
        }

    def select_pairs(self, student: Outputs | NetworkInfo, teacher: Outputs | NetworkInfo) -> tuple[list, list]:
        if self.cfg.ALIGN == "deep":
            return super().select_pairs(student, teacher)
        maps = [of.feats[self.cfg.FIRST :] for of in (student, teacher)]
        return tuple(list(of[: min(map(len, maps))]) for of in maps)

    def feature_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        return at_loss(feats_student, feats_teacher, self.cfg.P)
