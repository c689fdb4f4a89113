"""Every classifier that can be a student or a teacher, behind one function: :func:`build_model`."""

# Importing a family's file registers its models.
from . import mobilenet, resnet, shufflenet, vgg, wrn  # noqa: F401
from .base import FeatureClassifier
from .library import is_without_classes
from .registry import build_model, model_names, register

__all__ = ["FeatureClassifier", "build_model", "is_without_classes", "model_names", "register"]
