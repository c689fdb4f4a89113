"""Backbones that Detectron2 lacks, in its own registry: importing this package makes their names known."""

from .mobilenetv2 import MobileNetV2, build_mobilenetv2_fpn_backbone, build_retinanet_mobilenetv2_fpn_backbone

__all__ = ["MobileNetV2", "build_mobilenetv2_fpn_backbone", "build_retinanet_mobilenetv2_fpn_backbone"]
