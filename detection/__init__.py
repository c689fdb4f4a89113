"""Distillation of Detectron2 detectors. Importing it, or any part of it, registers meta-architectures and backbones."""

from d2distill.common.errors import require_detectron2

require_detectron2()

from d2distill.detection import backbone, meta_arch  # noqa: E402

__all__ = ["backbone", "meta_arch"]
