"""Distillation of Detectron2 detectors. Importing it, or any part of it, registers meta-architectures and backbones."""

from d2distill.detection import backbone, meta_arch

__all__ = ["backbone", "meta_arch"]
