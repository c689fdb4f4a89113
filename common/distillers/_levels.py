"""Feature maps of two networks, level by level, for the methods that compare them in one shape."""

from collections.abc import Iterator, Sequence
from typing import Any

from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from d2distill.common.distillers._features import FeatureDistiller, align
from d2distill.common.distillers._numerics import no_autocast, upcast
from d2distill.common.outputs import Batch, NetworkInfo, Outputs, TrainingData

__all__: list[str] = []


def resize_pairs_to_teacher(
    feats_student: Sequence[Tensor], feats_teacher: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of maps (N, C, H, W), at least fp32, the student's interpolated to the teacher's size.

    No gradient reaches the teacher.

    Raises:
        ValueError: maps of different channels, or none.
    """
    if not (feats_student and feats_teacher):
        raise ValueError("there are no feature maps to compare")
    for student, teacher in zip(*align(feats_student, feats_teacher), strict=True):
        if student.shape[:2] != teacher.shape[:2]:
            raise ValueError(
                f"maps of {tuple(student.shape)} and {tuple(teacher.shape)} have different samples or channels"
            )
        student, teacher = upcast(student), upcast(teacher).detach()
        if student.shape != teacher.shape:
            student = F.interpolate(student, teacher.shape[2:], mode="bilinear", align_corners=False)
        yield student, teacher


class LevelDistiller(FeatureDistiller):
    """Base of the methods that compare maps of equal channels. A subclass states `defaults()` and `feature_loss()`.

    Compared are LEVELS maps (0: all) from number FIRST on; FIRST -1 takes the last one. Student maps of other channels
    go through a learned 1x1 convolution.
    """

    def __init__(
        self, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData | None = None
    ) -> None:
        super().__init__(cfg, student, teacher, data)
        channels = [(s[0], t[0]) for s, t in zip(*self.select_pairs(student, teacher), strict=True)]
        self.connectors = nn.ModuleList(nn.Identity() if s == t else nn.Conv2d(s, t, 1) for s, t in channels)

    @classmethod
    def common_defaults(cls) -> dict[str, Any]:
        return {**super().common_defaults(), "LEVELS": 0}

    def select_pairs(
        self, student: Outputs | NetworkInfo, teacher: Outputs | NetworkInfo
    ) -> tuple[list[Any], list[Any]]:
        first, last = self.cfg.FIRST, self.cfg.LEVELS or None
        return align(student.feats[first:][:last], teacher.feats[first:][:last])

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        feats_student, feats_teacher = self.select_pairs(student, teacher)
        # Half precision has no room for squares and sums over whole maps.
        with no_autocast(feats_student[0]):
            connected = [c(upcast(s)) for c, s in zip(self.connectors, feats_student, strict=True)]
            return self.feature_loss(connected, feats_teacher)
