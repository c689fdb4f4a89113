"""Soft targets: mixup and cutmix by torchvision, and label smoothing."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from d2distill.common.config import CfgNode

__all__ = ["build_soft_targets"]


def build_soft_targets(cfg: CfgNode, num_classes: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """What gives a training batch its ``soft_target`` (N, C), by INPUT.MIXUP, INPUT.CUTMIX and SOLVER.LABEL_SMOOTHING.

    Mixup and cutmix are torchvision's, one of the two in each step where both are set. They draw from torch's generator
    which the trainer seeds by (seed, step). Student and teacher see the same mixed images. The ``label`` stays: with
    label smoothing alone, methods that need the one class of an image have it. None where no setting asks for one.
    """
    kinds = ((v2.MixUp, cfg.INPUT.MIXUP), (v2.CutMix, cfg.INPUT.CUTMIX))
    mixes = [mix(alpha=alpha, num_classes=num_classes) for mix, alpha in kinds if alpha]
    smoothing = cfg.SOLVER.LABEL_SMOOTHING
    if not mixes and not smoothing:
        return None

    def soften(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, target = batch["image"], batch["label"]
        if mixes and len(target):
            mix = mixes[int(torch.rand(()) * len(mixes))] if len(mixes) > 1 else mixes[0]
            images, target = mix(images.float(), target)
            # It numbers the augmentations of one image.
            batch = {name: part for name, part in batch.items() if name != "key"}
        else:
            target = F.one_hot(target, num_classes).float()
        target = (1 - smoothing) * target + smoothing / num_classes
        return {**batch, "image": images, "soft_target": target}

    return soften
