"""The contract between tasks and distillation methods: everything a method may look at, as data.

Classification fills it from a backbone, detection from FPN maps and the logits of proposals or anchors; a method never
knows which of the two called it.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = ["Batch", "NetworkInfo", "Outputs", "Progress", "TrainingData"]


@dataclass
class Outputs:
    """What one network provides for a batch. A part that it does not have, or that nobody needs, is None.

    Attributes:
        logits: (N, C) class logits before the softmax; in detection (R, K + 1), one row per proposal, or before
            sigmoids (R, K), one row per anchor (`NetworkInfo.sigmoid`).
        feats: feature maps from shallow to deep, each (N, C_i, H_i, W_i). A classifier's entry 0 is its
            stem ("stages" in the literature are ``feats[1:]``); in detection p2 to p6.
        preacts: the same maps before their last ReLU.
        pooled: (N, D), the flattened vector that enters the classifier; one row per image.
        extras: what a method asked for beyond that, by the name under which it asked, see :attr:`.Distiller.needs`
            and :attr:`.Distiller.teacher_extras`.
        members: (weight, outputs) of each of several teachers, weights that sum to 1; empty for one network. An
            ensemble has no other part.
    """

    logits: Tensor | None = None
    feats: list[Tensor] | None = None
    preacts: list[Tensor] | None = None
    pooled: Tensor | None = None
    extras: dict[str, Tensor | list[Tensor]] = field(default_factory=dict)
    members: list[tuple[float, "Outputs"]] = field(default_factory=list)

    def select(self, parts: Collection[str]) -> "Outputs":
        """These parts alone, with all extras: the memory of the others is free before the losses are computed."""
        given = {name: getattr(self, name) for name in ("logits", "feats", "preacts", "pooled") if name in parts}
        return Outputs(**given, extras=self.extras)

    def is_finite(self) -> Tensor | None:
        """Whether logits, pooled vector and last feature map are finite, 0-d, not waited for; None without them."""
        parts = [self.logits, self.pooled, self.feats[-1] if self.feats else None]
        found = [part.isfinite().all() for part in parts if part is not None]
        found += [finite for _, outputs in self.members if (finite := outputs.is_finite()) is not None]
        return torch.stack(found).all() if found else None

    def info(self, **more: object) -> "NetworkInfo":
        """The shapes of these outputs as a :class:`NetworkInfo`; `more` are its other fields."""

        def shapes(maps: list[Tensor] | None) -> tuple[tuple[int, ...], ...] | None:
            return None if maps is None else tuple(tuple(m.shape[1:]) for m in maps)

        return NetworkInfo(
            num_classes=None if self.logits is None else self.logits.shape[1],
            feats=shapes(self.feats),
            preacts=shapes(self.preacts),
            pooled=None if self.pooled is None else self.pooled.shape[1],
            **more,
        )


@dataclass(frozen=True)
class NetworkInfo:
    """What a method may know of a network when it is built: shapes of its outputs without the batch axis, and itself.

    Attributes:
        num_classes: C of the logits (background included in detection); None for a network without classes.
        feats, preacts: (C_i, H_i, W_i) per map, or (C_i,) where the size changes with the image.
        pooled: D.
        sigmoid: the class logits are those of independent sigmoids, as in dense detectors (background is where all
            are low, and has no column) and multi-label classifiers; False: of one softmax over all. Shapes do not show
            it.
        classifier: the last layer, from `pooled` to the logits; frozen in a teacher. None where there is no such layer.
        module: the network. A method that keeps it must not register it as its own submodule.
    """

    num_classes: int | None = None
    feats: tuple[tuple[int, ...], ...] | None = None
    preacts: tuple[tuple[int, ...], ...] | None = None
    pooled: int | None = None
    sigmoid: bool = False
    classifier: nn.Module | None = None
    module: nn.Module | None = None


@dataclass(frozen=True)
class TrainingData:
    """What a method may know of the training set when it is built.

    Attributes:
        num_samples: its size, None if unknown.
        labels: (num_samples,) class of each sample, in the order of `Batch.index`, None if unknown.
    """

    num_samples: int | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        step: the current step, counted from 0.
        epoch: the current epoch, counted from 1; None where a task counts steps only.
        fraction: of the whole run, from 0 to 1.
    """

    step: int = 0
    epoch: float | None = None
    fraction: float = 0.0

    @property
    def time(self) -> float:
        """In the unit of WARMUP: the epoch, or without epochs the step, both counted from 1."""
        return self.step + 1 if self.epoch is None else self.epoch


@dataclass
class Batch:
    """What a method may know of a training step besides the outputs. Fields may be added, never removed.

    Attributes:
        target: (R,) class of each row of the logits. Rows that do not count are left out beforehand, as the detectors
            here do, or negative, which few methods take. None where images have several classes.
        soft_target: (N, C) class probabilities that take the place of `target` (mixup, cutmix, label smoothing), or
            None. Where images have several classes, 0 or 1 each.
        index: (N,) positions of the samples in the training set.
        key: (N,) which augmentation each sample has, where they are numbered. It stays where the loader put it.
        host_index: (N,) `index` where the loader put it, which is most often the CPU: to look something up there
            without waiting for the device.
        progress: how far the training is.
        boxes: in detection the ground-truth boxes of each image, (B_i, 4) as x0, y0, x1, y1 in pixels.
        image_sizes: in detection (height, width) of each image.
        view: which of several views of the images this is.
        extras: what else the loader's batch holds, by name.
    """

    target: Tensor | None = None
    soft_target: Tensor | None = None
    index: Tensor | None = None
    key: Tensor | None = None
    host_index: Tensor | None = None
    progress: Progress = Progress()
    boxes: list[Tensor] | None = None
    image_sizes: list[tuple[int, int]] | None = None
    view: int = 0
    extras: dict[str, Tensor] = field(default_factory=dict)
