"""Masked generative distillation."""

import torch
from torch import Tensor, nn

from d2distill.common.distillers._features import LevelDistiller, resize_pairs_to_teacher
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
        feats_generated, feats_teacher: lists of g and t, maps (N, C, H, W) of equal channels. Of lists of different
            length the deepest entries are compared; a g of another size is interpolated to the teacher's.
    """
    pairs = resize_pairs_to_teacher(feats_generated, feats_teacher)
    return sum((generated - teacher).square().sum() / max(len(teacher), 1) for generated, teacher in pairs)


@DISTILLERS.register()
class MGD(LevelDistiller):
    """`mgd_loss` of maps that two 3x3 convolutions per level generate from randomly masked student maps.

    WEIGHT and LAMBDA are those of one-stage detectors; two-stage ones take 5e-7 and 0.45. The paper's classifiers
    mask channels of the last map alone: WEIGHT 7e-5, LAMBDA 0.15, MASK "channel", FIRST -1.
    """

    def build(self, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData) -> None:
        super().build(student, teacher, data)
        if self.cfg.MASK not in ("space", "channel"):
            raise ValueError(f'{self.name}: MASK is "space" or "channel", but was given {self.cfg.MASK!r}')
        if not 0 <= self.cfg.LAMBDA < 1:
            raise ValueError(f"{self.name}: LAMBDA, the masked part, is in [0, 1), but was given {self.cfg.LAMBDA}")
        self.generators = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(c, c, 3, padding=1))
            for c, *_ in self.select_pairs(student, teacher)[1]
        )

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WEIGHT": 2e-5,
            # Share of a map that is masked.
            "LAMBDA": 0.65,
            # What is masked: positions ("space") or channels ("channel").
            "MASK": "space",
        }

    def feature_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        # Resized before masking: a mask of the student's size would be blurred.
        pairs = resize_pairs_to_teacher(self.connected(feats_student), feats_teacher)
        generated = [
            generator(resized * random_mask(resized, self.cfg.LAMBDA, self.cfg.MASK))
            for generator, (resized, _) in zip(self.generators, pairs, strict=True)
        ]
        return mgd_loss(generated, feats_teacher)
