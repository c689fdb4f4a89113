"""Knowledge review: deep and shallow student maps, fused, against each of the teacher's."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2distill.common.distillers._features import BatchNorm, FeatureDistiller, pool_pairs_to_smaller
from d2distill.common.distillers._numerics import mse
from d2distill.common.distillers.base import DISTILLERS
from d2distill.common.outputs import NetworkInfo, Outputs, TrainingData

__all__ = ["ReviewKD", "hcl_loss"]


def hcl_loss(feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
    """Hierarchical context loss.

    Chen et al.: Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv:2104.09044.

        sum over maps of [MSE(s, t) + 1/2 MSE(s_4, t_4) + 1/4 MSE(s_2, t_2) + 1/8 MSE(s_1, t_1)] / (1 + 1/2 + 1/4 + 1/8)

    with s_l average-pooled to l x l. A grid that is not smaller than the map is left out; the weights then go to the
    others in the same order, and their sum is that of the ones used. The larger map of a pair is average-pooled to
    the smaller.

    Args:
        feats_student, feats_teacher: lists of the same length of (N, C, H, W).
    """
    total = 0.0
    for student, teacher in pool_pairs_to_smaller(feats_student, feats_teacher):
        loss, weight, weights = mse(student, teacher), 1.0, 1.0
        for level in (4, 2, 1):
            if level < min(student.shape[2:]):
                weight /= 2
                weights += weight
                pooled = (F.adaptive_avg_pool2d(feats, level) for feats in (student, teacher))
                loss = loss + weight * mse(*pooled)
        total = total + loss / weights
    return total


class Fusion(nn.Module):
    """Attention-based fusion of a map with the result of the next deeper one.

    Args:
        channels_in, channels_mid, channels_out: of the student's map, in between, and of the teacher's map.
        deepest: there is nothing deeper to fuse with.
    """

    def __init__(self, channels_in: int, channels_mid: int, channels_out: int, deepest: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(channels_in, channels_mid, 1, bias=False), BatchNorm(channels_mid))
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * channels_mid, 2, 1), nn.Sigmoid())
        self.expand = nn.Sequential(
            nn.Conv2d(channels_mid, channels_out, 3, padding=1, bias=False), BatchNorm(channels_out)
        )
        for conv in (self.reduce[0], self.expand[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The map to compare with the teacher's, of its `size`, and the one to hand to the next shallower fusion."""
        x = self.reduce(x)
        if self.attention is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            attention = self.attention(torch.cat([x, deeper], dim=1))
            x = x * attention[:, :1] + deeper * attention[:, 1:]
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.expand(x), x


@DISTILLERS.register()
class ReviewKD(FeatureDistiller):
    """`hcl_loss` of the fused student maps, from deep to shallow, to the teacher's.

    The student's maps are its stages (before their last ReLU with STUDENT_PREACT, if it has such maps), the teacher's
    its stages before their last ReLU where it has them; both with the pooled vector as a deepest map of 1 x 1 where
    both have one.
    """

    def build(self, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData) -> None:
        super().build(student, teacher, data)
        if self.cfg.STUDENT_PREACT and student.preacts is None:
            raise ValueError(f"{self.name}: STUDENT_PREACT is set, but the student has no pre-activations")
        self.student_maps = "preacts" if self.cfg.STUDENT_PREACT else "feats"
        self.teacher_maps = "feats" if teacher.preacts is None else "preacts"
        self.student_needs, self.teacher_needs = {self.student_maps, "pooled"}, {self.teacher_maps, "pooled"}
        self.with_pooled = student.pooled is not None and teacher.pooled is not None
        shapes_student, shapes_teacher = self.select_pairs(student, teacher)
        mid = min(512, shapes_student[-1][0])
        self.fusions = nn.ModuleList(
            Fusion(s[0], mid, t[0], deepest=i == len(shapes_student) - 1)
            for i, (s, t) in enumerate(zip(shapes_student, shapes_teacher, strict=True))
        )

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WEIGHT": 5.0,
            "WARMUP": 20,
            # Compare the student's maps before their last ReLU.
            "STUDENT_PREACT": False,
        }

    def select_pairs(self, student: Outputs | NetworkInfo, teacher: Outputs | NetworkInfo) -> tuple[list, list]:
        maps_student, maps_teacher = super().select_pairs(student, teacher)
        if not self.with_pooled:
            return maps_student, maps_teacher
        return [*maps_student, _as_map(student.pooled)], [*maps_teacher, _as_map(teacher.pooled)]

    def feature_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        fused, deeper = [], None
        for fusion, student, teacher in reversed(list(zip(self.fusions, feats_student, feats_teacher, strict=True))):
            result, deeper = fusion(student, deeper, teacher.shape[2:])
            fused.insert(0, result)
        return hcl_loss(fused, feats_teacher)


def _as_map(pooled: Tensor | int) -> Tensor | tuple[int, int, int]:
    """A pooled vector (N, D) as a map of 1 x 1, or D as the shape of one."""
    return (pooled, 1, 1) if isinstance(pooled, int) else pooled[:, :, None, None]
