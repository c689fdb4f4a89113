"""RetinaNet with a teacher that looks at the same anchors."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.structures import Boxes
from torch import Tensor, nn

from d2distill.common.errors import ConfigError
from d2distill.detection.meta_arch.base import Calls, DistillDetector

__all__ = ["DistillRetinaNet"]


@META_ARCH_REGISTRY.register()
class DistillRetinaNet(DistillDetector, RetinaNet):
    """RetinaNet whose maps (``feats``) and anchor classes (``logits``) are compared with a teacher's.

    The logits are those of all anchors but the ignored ones, (R, K), each class a sigmoid of its own; the target is
    the class of the anchor, K for background.
    """

    head_takes_proposals = False

    @classmethod
    def logits_info(cls, cfg: CfgNode) -> dict[str, Any]:
        return {"num_classes": cfg.MODEL.RETINANET.NUM_CLASSES, "sigmoid": True}

    @classmethod
    def check_comparable(cls, parts: dict[str, Any], teacher: nn.Module, method: str) -> None:
        if not isinstance(teacher, RetinaNet):
            kind = type(teacher).__name__
            raise ConfigError(f"DISTILL.METHODS: {method} compares the classes of anchors, but the teacher is a {kind}")
        keys = ("backbone", "head_in_features", "anchor_generator")
        networks = ([parts[key] for key in keys], [getattr(teacher, key) for key in keys])
        sides = [
            {
                "strides": [backbone.output_shape()[name].stride for name in levels],
                "anchors": [cell.tolist() for cell in anchors.cell_anchors],
                "padding": (backbone.size_divisibility, backbone.padding_constraints),
            }
            for backbone, levels, anchors in networks
        ]
        different = [name for name in sides[0] if sides[0][name] != sides[1][name]]
        if different:
            facts = "; ".join(f"{name} {sides[0][name]} and {sides[1][name]}" for name in different)
            raise ConfigError(
                f"DISTILL.METHODS: {method} compares the classes of the same anchors, but student and teacher differ "
                f"in their {facts}: make MODEL.ANCHOR_GENERATOR, MODEL.RETINANET.IN_FEATURES and the backbones alike"
            )

    def losses(
        self, anchors: list[Boxes], pred_logits: list[Tensor], gt_labels: list[Tensor], *more: Any
    ) -> dict[str, Tensor]:
        if self._compares_logits:
            self._compared = pred_logits, gt_labels  # with the anchors in rows already
        return super().losses(anchors, pred_logits, gt_labels, *more)

    def student_logits(self, calls: Calls) -> tuple[Tensor, Tensor]:
        (logits, labels), self._compared = self._compared, None
        labels = torch.cat(labels)  # -1: ignored, K: background
        self._counts = (labels >= 0).nonzero().squeeze(1)  # once: a GPU is waited for here
        return _rows(logits)[self._counts], labels[self._counts]

    def teacher_head(self, maps: dict[str, Tensor]) -> Tensor:
        predictions, _ = self.teacher.head([maps[name] for name in self.teacher.head_in_features])
        (logits,) = self._transpose_dense_predictions([predictions], [self.num_classes])
        return _rows(logits)

    def teacher_logits(self, calls: Calls, found: Tensor) -> Tensor:
        return found[self._counts]


def _rows(logits: list[Tensor]) -> Tensor:
    """Logits (N * anchors, K) of those of each level, (N, its anchors, K)."""
    return torch.cat(logits, dim=1).flatten(0, 1)
