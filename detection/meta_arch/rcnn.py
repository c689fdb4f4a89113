"""Faster and Mask R-CNN with a teacher that looks at the same proposals."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from torch import Tensor, nn

from d2distill.common.errors import ConfigError
from d2distill.detection.meta_arch.base import Calls, DistillDetector

__all__ = ["DistillRCNN"]


@META_ARCH_REGISTRY.register()
class DistillRCNN(DistillDetector, GeneralizedRCNN):
    """GeneralizedRCNN whose maps (``feats``) and box classes (``logits``) are compared with a teacher's.

    The logits are those of the sampled proposals, (R, K + 1) with the background last, taken where the box head
    computes them for the detector's own losses; the target is their ``gt_classes``. The teacher's box head sees the
    same boxes on the teacher's maps.
    """

    @classmethod
    def logits_info(cls, cfg: CfgNode) -> dict[str, Any]:
        sigmoid = cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE
        return {"num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES + (not sigmoid), "sigmoid": sigmoid}

    @classmethod
    def check_comparable(cls, parts: dict[str, Any], teacher: nn.Module, method: str) -> None:
        for side, heads in (("student", parts["roi_heads"]), ("teacher", getattr(teacher, "roi_heads", None))):
            if not isinstance(heads, StandardROIHeads) or not isinstance(heads.box_predictor, FastRCNNOutputLayers):
                raise ConfigError(
                    f"DISTILL.METHODS: {method} compares the classes of proposals, which needs StandardROIHeads with "
                    f"one box predictor, but the {side} has {type(heads).__name__}"
                )

    def hooked_modules(self) -> dict[str, nn.Module]:
        if not self._compares_logits:
            return super().hooked_modules()
        heads = self.roi_heads
        parts = {"pooler": heads.box_pooler, "predictor": heads.box_predictor, "heads": heads}
        return {**super().hooked_modules(), **parts}

    def student_logits(self, calls: Calls) -> tuple[Tensor, Tensor]:
        proposals, _ = calls["heads"][0].output
        target = torch.cat([per_image.gt_classes for per_image in proposals])
        return self._columns(calls["predictor"][0].output[0]), target

    def teacher_logits(self, calls: Calls, found: dict[str, Tensor]) -> Tensor:
        heads = self.teacher.roi_heads
        # The boxes as the student's head saw them: later they may be replaced by those it predicts.
        _, boxes = calls["pooler"][0].args
        pooled = heads.box_pooler([found[name] for name in heads.box_in_features], boxes)
        return self._columns(heads.box_predictor(heads.box_head(pooled))[0])

    def _columns(self, scores: Tensor) -> Tensor:
        # With independent sigmoids the background's column is there, but nothing trains it.
        return scores[:, :-1] if self.roi_heads.box_predictor.use_sigmoid_ce else scores
