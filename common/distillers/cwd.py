"""Channel-wise distillation: where each channel of a feature map looks."""

from torch import Tensor
from torch.nn import functional as F

from d2distill.common.distillers._features import LevelDistiller, resize_pairs_to_teacher
from d2distill.common.distillers._numerics import kl_per_sample, safe_mean
from d2distill.common.distillers.base import DISTILLERS

__all__ = ["CWD", "cwd_loss"]


def cwd_loss(feats_student: list[Tensor], feats_teacher: list[Tensor], temperature: float = 1.0) -> Tensor:
    """Divergence of each channel's distribution over space.

    Shu et al.: Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, arXiv:2011.13256.

        sum over levels of T^2 / (N * C) * sum over samples and channels of KL(softmax(t / T) || softmax(s / T))

    with softmax and KL over the H * W positions of a channel.

    Args:
        feats_student, feats_teacher: lists of maps (N, C, H, W) of equal channels. Of lists of different length the
            deepest entries are compared; a student map of another size is interpolated to the teacher's.
        temperature: T > 0.
    """
    return temperature**2 * sum(
        safe_mean(kl_per_sample(*(F.log_softmax(maps.flatten(2).flatten(0, 1) / temperature, dim=1) for maps in pair)))
        for pair in resize_pairs_to_teacher(feats_student, feats_teacher)
    )


@DISTILLERS.register()
class CWD(LevelDistiller):
    """`cwd_loss` on feature maps."""

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WEIGHT": 10.0,
            # Temperature of each channel's softmax over space.
            "T": 1.0,
        }

    def feature_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        return cwd_loss(self.connected(feats_student), feats_teacher, self.cfg.T)
