"""Meta-architectures with a teacher at their side, in Detectron2's registry."""

import detection.backbone  # noqa: F401 - registers backbones that any of them may have
from detection.meta_arch.base import DistillDetector
from detection.meta_arch.rcnn import DistillRCNN
from detection.meta_arch.retinanet import DistillRetinaNet

__all__ = ["DistillDetector", "DistillRCNN", "DistillRetinaNet"]
