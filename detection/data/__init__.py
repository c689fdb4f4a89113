"""Detection data: register, load and check data sets, and build loaders whose batches depend on (seed, step) only."""

from . import digits_coco
from .catalog import check_test_sets, check_trained_classes, load_test_set, load_training_set, register_datasets
from .loader import build_test_loader, build_train_loader

__all__ = [
    "build_test_loader",
    "build_train_loader",
    "check_test_sets",
    "check_trained_classes",
    "load_test_set",
    "load_training_set",
    "register_datasets",
]

digits_coco.register()
