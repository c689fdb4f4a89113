"""Data sets and augmentation for image classification."""

from . import arrays, folders  # noqa: F401  (importing them registers their data sets)
from .augment import AUGMENTATION_REGISTRY, Augmentation, AugmentedDataset, build_augmentation, eval_transform
from .datasets import (
    DATASET_REGISTRY,
    ArrayDataset,
    DatasetInfo,
    FileDataset,
    ImageDataset,
    build_dataset,
    dataset_info,
    register_dataset,
)

__all__ = [
    "AUGMENTATION_REGISTRY",
    "DATASET_REGISTRY",
    "ArrayDataset",
    "Augmentation",
    "AugmentedDataset",
    "DatasetInfo",
    "FileDataset",
    "ImageDataset",
    "build_augmentation",
    "build_dataset",
    "dataset_info",
    "eval_transform",
    "register_dataset",
]
