"""Meta-architectures with a teacher at their side, in Detectron2's registry."""

from d2distill.detection.meta_arch.base import DistillDetector
from d2distill.detection.meta_arch.rcnn import DistillRCNN
from d2distill.detection.meta_arch.retinanet import DistillRetinaNet

__all__ = ["DistillDetector", "DistillRCNN", "DistillRetinaNet"]
