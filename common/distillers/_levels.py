"""Feature maps of two networks, level by level, for the methods that compare them in one shape."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from common.distillers._numerics import at_least_float32
from common.distillers.base import Context, Distiller
from common.outputs import Outputs, OutputSpec

__all__: list[str] = []

Entry = TypeVar("Entry")


def aligned(student: Sequence[Entry], teacher: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """Pairs from shallow to deep; of lists of different length the deepest entries."""
    return list(zip(reversed(student), reversed(teacher), strict=False))[::-1]


def same_size(feats_student: Sequence[Tensor], feats_teacher: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of maps (N, C, H, W), at least fp32, the student's interpolated to the teacher's size.

    No gradient reaches the teacher.

    Raises:
        ValueError: maps of different channels, or none.
    """
    pairs = aligned(feats_student, feats_teacher)
    if not pairs:
        raise ValueError("there are no feature maps to compare")
    for student, teacher in pairs:
        if student.shape[:2] != teacher.shape[:2]:
            raise ValueError(
                f"maps of {tuple(student.shape)} and {tuple(teacher.shape)} have different samples or channels"
            )
        student, teacher = at_least_float32(student), at_least_float32(teacher).detach()
        if student.shape != teacher.shape:
            student = F.interpolate(student, teacher.shape[2:], mode="bilinear", align_corners=False)
        yield student, teacher


class LevelDistiller(Distiller):
    """Base of the methods that compare feature maps. A subclass states `defaults()` and `level_loss()`.

    Compared are LEVELS maps (0: all) from number FIRST on; 1 leaves out a classifier's stem, -1 takes the last one.
    Student maps of other channels go through a learned 1x1 convolution.

    Raises:
        ValueError: FIRST and LEVELS leave no map to compare.
    """

    needs = ("feats",)

    def __init__(
        self, cfg: CfgNode, student_spec: OutputSpec, teacher_spec: OutputSpec, num_samples: int | None = None
    ) -> None:
        super().__init__(cfg, student_spec, teacher_spec, num_samples)
        channels = [(s[0], t[0]) for s, t in self.levels(student_spec.feats, teacher_spec.feats)]
        if not channels:
            raise ValueError(f"{self.name} has no feature maps to compare from FIRST {cfg.FIRST} on")
        self.connectors = nn.ModuleList(nn.Identity() if s == t else nn.Conv2d(s, t, 1) for s, t in channels)

    @classmethod
    def common_defaults(cls) -> dict[str, Any]:
        return {**super().common_defaults(), "FIRST": 1, "LEVELS": 0}

    def levels(self, student: Sequence[Entry], teacher: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
        """The pairs of entries that FIRST and LEVELS choose from two lists of maps, or of their shapes."""
        first, last = self.cfg.FIRST, self.cfg.LEVELS or None
        return aligned(student[first:][:last], teacher[first:][:last])

    def level_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        """The method's term: a 0-d tensor from maps (N, C, H, W) of equal channels."""
        raise TypeError(f"{self.name} defines no level_loss()")

    def losses(self, student: Outputs, teacher: Outputs, target: Tensor, ctx: Context) -> dict[str, Tensor]:
        pairs = self.levels(student.feats, teacher.feats)
        # Half precision has no room for squares and sums over whole maps.
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            mapped = [c(at_least_float32(s)) for c, (s, _) in zip(self.connectors, pairs, strict=True)]
            loss = self.level_loss(mapped, [t for _, t in pairs])
        return {f"loss_{self.name.lower()}": loss}
