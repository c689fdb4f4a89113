"""Masked generative distillation."""

from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from d2distill.common.distillers._levels import LevelDistiller, resize_pairs_to_teacher
from d2distill.common.distillers.base import DISTILLERS
from d2distill.common.outputs import NetworkInfo, TrainingData

__all__ = ["MGD", "mgd_loss", "random_mask"]


def random_mask(maps: Tensor, ratio: float, over: str = "space") -> Tensor:
    """0 with probability `ratio`, else 1, to multiply maps (N, C, H, W) with.

    Args:
        maps: gives shape, type and device.
        ratio: lambda in the paper.
        over: "space" draws one value per position for all channels, (N, 1, H, W), "channel" one per channel,
            (N, C, 1, 1).
    """
    n, c, h, w = maps.shape
    shape = (n, 1, h, w) if over == "space" else (n, c, 1, 1)
    return (torch.rand(shape, device=maps.device) >= ratio).to(maps.dtype)


def mgd_loss(feats_generated: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
    """Squared error of maps generated from masked student maps.

    Yang et al.: Masked Generative Distillation, ECCV 2022, arXiv:2205.01529.

        sum over levels of 1 / N * sum over samples, channels and positions of (g - t)^2,   g = G(mask * s)

    Args:
        feats_generated, feats_teacher: lists of g and t, maps (N, C, H, W), from shallow to deep. Of lists of
            different length the deepest entries are compared; a g of another size is interpolated to the teacher's.

    Returns:
        0-d tensor; 0 for an empty batch. No gradient reaches the teacher.

    Raises:
        ValueError: maps of different channels.
    """
    pairs = resize_pairs_to_teacher(feats_generated, feats_teacher)
    return sum((generated - teacher).square().sum() / max(len(teacher), 1) for generated, teacher in pairs)


@DISTILLERS.register()
class MGD(LevelDistiller):
    """`mgd_loss` of maps that two 3x3 convolutions per level generate from randomly masked student maps.

    WEIGHT and LAMBDA are those of one-stage detectors; two-stage ones take 5e-7 and 0.45. The paper's classifiers
    mask channels of the last map alone: WEIGHT 7e-5, LAMBDA 0.15, MASK "channel", FIRST -1.

    Raises:
        ValueError: MASK is neither "space" nor "channel"; LAMBDA is not in [0, 1).
    """

    def __init__(
        self, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData | None = None
    ) -> None:
        super().__init__(cfg, student, teacher, data)
        if cfg.MASK not in ("space", "channel"):
            raise ValueError(f'{self.name}: MASK is "space" or "channel", but was given {cfg.MASK!r}')
        if not 0 <= cfg.LAMBDA < 1:
            raise ValueError(f"{self.name}: LAMBDA, the part that is masked, is in [0, 1), but was given {cfg.LAMBDA}")
        channels = [t[0] for t in self.select_pairs(student, teacher)[1]]
        self.generators = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(c, c, 3, padding=1))
            for c in channels
        )

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        return {"WEIGHT": 2e-5, "LAMBDA": 0.65, "MASK": "space"}

    def feature_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        # Resized before masking: a mask of the student's size would be blurred.
        resized = [student for student, _ in resize_pairs_to_teacher(feats_student, feats_teacher)]
        generated = [
            generator(student * random_mask(student, self.cfg.LAMBDA, self.cfg.MASK))
            for generator, student in zip(self.generators, resized, strict=True)
        ]
        return mgd_loss(generated, feats_teacher)
