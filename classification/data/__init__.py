"""Data sets and augmentation for image classification."""

from . import arrays, folders, multilabel  # noqa: F401  (importing them registers their data sets)
from .augment import AUGMENTATION_REGISTRY, Augmentation, AugmentedDataset
from .datasets import (
    DATASET_REGISTRY,
    ArrayDataset,
    DatasetInfo,
    ImageDataset,
    build_dataset,
    dataset_info,
    read_image,
    register_dataset,
)

__all__ = [
    "AUGMENTATION_REGISTRY",
    "DATASET_REGISTRY",
    "ArrayDataset",
    "Augmentation",
    "AugmentedDataset",
    "DatasetInfo",
    "ImageDataset",
    "build_dataset",
    "dataset_info",
    "read_image",
    "register_dataset",
]
