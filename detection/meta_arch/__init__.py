"""Meta-architectures with a teacher at their side, in Detectron2's registry."""

from detection.meta_arch.base import DistillDetector
from detection.meta_arch.rcnn import DistillRCNN
from detection.meta_arch.retinanet import DistillRetinaNet

__all__ = ["DistillDetector", "DistillRCNN", "DistillRetinaNet"]
