"""Data sets and augmentation for image classification."""

from . import cifar, digits, fashion_mnist, folders  # noqa: F401  (importing them registers their data sets)
from .augment import (
    AUGMENTATION_REGISTRY,
    Augmentation,
    augmentation_names,
    build_augmentation,
    eval_transform,
    load_sample,
    sample_rng,
)
from .datasets import (
    DATASET_REGISTRY,
    ArrayDataset,
    DatasetInfo,
    FileDataset,
    ImageDataset,
    UnreadableImageError,
    build_dataset,
    dataset_info,
    dataset_names,
    read_image,
    register_dataset,
)

__all__ = [
    "AUGMENTATION_REGISTRY",
    "DATASET_REGISTRY",
    "ArrayDataset",
    "Augmentation",
    "DatasetInfo",
    "FileDataset",
    "ImageDataset",
    "UnreadableImageError",
    "augmentation_names",
    "build_augmentation",
    "build_dataset",
    "dataset_info",
    "dataset_names",
    "eval_transform",
    "load_sample",
    "read_image",
    "register_dataset",
    "sample_rng",
]
