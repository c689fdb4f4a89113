"""Outputs: the one contract between tasks and distillation methods.

Classification fills it from a backbone, detection from FPN maps and ROI class logits;
a method never knows which of the two called it.
"""

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["OutputSpec", "Outputs"]


@dataclass
class Outputs:
    """What one network hands to the distillation methods. A part that it does not have is None.

    Attributes:
        logits: (N, C) class scores before the softmax; in detection (R, K + 1), one row per proposal, or before
            sigmoids (R, K), one row per anchor (`OutputSpec.sigmoid`).
        feats: feature maps from shallow to deep, each (N, C_i, H_i, W_i). A classifier's entry 0 is its
            stem ("stages" in the literature are ``feats[1:]``); in detection p2 to p6.
        preacts: the same maps before their last ReLU.
        pooled: (N, D), the flattened vector that enters the classifier.
        ensemble: (share, logits) of each of several teachers, shares that sum to 1; None where there is one.
    """

    logits: Tensor | None = None
    feats: list[Tensor] | None = None
    preacts: list[Tensor] | None = None
    pooled: Tensor | None = None
    ensemble: list[tuple[float, Tensor]] | None = None

    def spec(self) -> "OutputSpec":
        """The shapes of these outputs, without the batch axis; ``sigmoid``, which is no shape, stays False."""

        def shapes(maps: list[Tensor] | None) -> tuple[tuple[int, ...], ...] | None:
            return None if maps is None else tuple(tuple(m.shape[1:]) for m in maps)

        return OutputSpec(
            num_classes=None if self.logits is None else self.logits.shape[1],
            feats=shapes(self.feats),
            preacts=shapes(self.preacts),
            pooled=None if self.pooled is None else self.pooled.shape[1],
        )


@dataclass(frozen=True)
class OutputSpec:
    """Shapes of a network's :class:`Outputs`: what a method builds its connectors from.

    Attributes:
        num_classes: C of the logits (background included in detection).
        feats, preacts: (C_i, H_i, W_i) per map, or (C_i,) where the size changes with the image.
        pooled: D.
        bn_before_relu: the batch norm before the last ReLU of each of ``preacts[1:]``, where the network has them.
        sigmoid: the class scores are sigmoids, each of its class alone, as in dense detectors (background is where all
            are low, and has no column); False: one softmax over all. Shapes do not show it: whoever builds such a
            network sets it.
        row_per_image: a row of the logits is an image, as are those of the other parts; False: a proposal or an anchor.
    """

    num_classes: int | None = None
    feats: tuple[tuple[int, ...], ...] | None = None
    preacts: tuple[tuple[int, ...], ...] | None = None
    pooled: int | None = None
    bn_before_relu: tuple[nn.Module, ...] | None = None
    sigmoid: bool = False
    row_per_image: bool = True
