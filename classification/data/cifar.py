"""CIFAR-10 and CIFAR-100 in their python pickle folders (https://www.cs.toronto.edu/~kriz/cifar.html).

torchvision's classes check md5 sums, which refuses every subset; here a folder is as many samples as its files hold.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from d2distill.common.engine.safe_pickle import load_arrays
from d2distill.common.errors import DataError

from .datasets import ArrayDataset, DatasetInfo, find_folder, register_dataset

logger = logging.getLogger("detectron2.d2distill")


def _entry(content: Any, key: str, path: Path) -> Any:
    if not isinstance(content, dict) or key not in content:
        raise DataError(f"{path} is not a CIFAR file: it has no entry {key!r}")
    return content[key]


def _read_batch(path: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) of one batch file."""
    content = load_arrays(path)
    images, labels = _entry(content, "data", path), np.asarray(_entry(content, label_key, path))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != (len(labels), 3072):
        found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{path}: images must be uint8 (n, 3072) for n = {len(labels)} labels, found {found}")
    return images.reshape(-1, 3, 32, 32), labels


def _open(
    info: DatasetInfo, root: str, folder_name: str, batches: list[str], meta: str, label_key: str, names_key: str
) -> ArrayDataset:
    folder = find_folder(
        info, root, [folder_name, ""], lambda folder: [name for name in batches[:1] if not (folder / name).is_file()]
    )
    present = [name for name in batches if (folder / name).is_file()]
    if len(present) < len(batches):
        logger.warning("%s has only %d of %d training files: %s", folder, len(present), len(batches), present)
    parts = [_read_batch(folder / name, label_key) for name in present]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    names = range(info.num_classes)
    if (folder / meta).is_file():
        names = _entry(load_arrays(folder / meta), names_key, folder / meta)
    return ArrayDataset(info, images, labels, [n.decode() if isinstance(n, bytes) else str(n) for n in names])


@register_dataset(
    DatasetInfo(
        name="cifar100",
        num_classes=100,
        image_size=32,
        pixel_mean=(0.5071 * 255, 0.4867 * 255, 0.4408 * 255),
        pixel_std=(0.2675 * 255, 0.2565 * 255, 0.2761 * 255),
        model_family="cifar",
        augmentation="crop_flip",
        source="""python -c "import torchvision; torchvision.datasets.CIFAR100('ROOT', download=True)" """.rstrip(),
    )
)
def build_cifar100(info: DatasetInfo, root: str, split: str) -> ArrayDataset:
    """CIFAR-100 with its 100 fine labels, from ROOT/cifar-100-python."""
    batch = "train" if split == "train" else "test"
    return _open(info, root, "cifar-100-python", [batch], "meta", "fine_labels", "fine_label_names")


@register_dataset(
    DatasetInfo(
        name="cifar10",
        num_classes=10,
        image_size=32,
        pixel_mean=(0.4914 * 255, 0.4822 * 255, 0.4465 * 255),
        pixel_std=(0.2470 * 255, 0.2435 * 255, 0.2616 * 255),
        model_family="cifar",
        augmentation="crop_flip",
        source="""python -c "import torchvision; torchvision.datasets.CIFAR10('ROOT', download=True)" """.rstrip(),
    )
)
def build_cifar10(info: DatasetInfo, root: str, split: str) -> ArrayDataset:
    """CIFAR-10 from ROOT/cifar-10-batches-py; trains on the data_batch files that exist, the first at least."""
    batches = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    return _open(info, root, "cifar-10-batches-py", batches, "batches.meta", "labels", "label_names")
