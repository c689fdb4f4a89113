"""Small data sets that are held in memory: CIFAR-10 and CIFAR-100, Fashion-MNIST, scikit-learn's digits."""

import gzip
import logging
import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from d2distill.common.data.digits import load_digits_split
from d2distill.common.engine.safe_pickle import load_arrays
from d2distill.common.errors import DataError

from .datasets import ArrayDataset, DatasetInfo, find_folder, register_dataset

logger = logging.getLogger("detectron2.d2distill")
_TORCHVISION = """python -c "import torchvision; torchvision.datasets.{}('ROOT', download=True)\""""
_CIFAR = DatasetInfo(
    name="cifar100",
    num_classes=100,
    image_size=32,
    pixel_mean=(0.5071 * 255, 0.4867 * 255, 0.4408 * 255),
    pixel_std=(0.2675 * 255, 0.2565 * 255, 0.2761 * 255),
    model_family="cifar",
    augmentation="crop_flip",
    source=_TORCHVISION.format("CIFAR100"),
)
DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@register_dataset(_CIFAR)
def build_cifar100(info: DatasetInfo, root: str, split: str) -> ArrayDataset:
    """CIFAR-100 with its 100 fine labels, from ROOT/cifar-100-python (https://www.cs.toronto.edu/~kriz/cifar.html)."""
    batch = "train" if split == "train" else "test"
    return _cifar(info, root, "cifar-100-python", [batch], "fine_labels", "meta", "fine_label_names")


@register_dataset(
    replace(
        _CIFAR,
        name="cifar10",
        num_classes=10,
        pixel_mean=(0.4914 * 255, 0.4822 * 255, 0.4465 * 255),
        pixel_std=(0.2470 * 255, 0.2435 * 255, 0.2616 * 255),
        source=_TORCHVISION.format("CIFAR10"),
    )
)
def build_cifar10(info: DatasetInfo, root: str, split: str) -> ArrayDataset:
    """CIFAR-10 from ROOT/cifar-10-batches-py; trains on the data_batch files that exist, the first at least."""
    batches = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    return _cifar(info, root, "cifar-10-batches-py", batches, "labels", "batches.meta", "label_names")


def _cifar(
    info: DatasetInfo, root: str, name: str, batches: list[str], label_key: str, meta: str, names_key: str
) -> ArrayDataset:
    # torchvision's classes check md5 sums, which refuses every subset, and unpickle whatever the files hold.
    folder = find_folder(info, root, [name, ""], lambda folder: [b for b in batches[:1] if not (folder / b).is_file()])
    present = [batch for batch in batches if (folder / batch).is_file()]
    if len(present) < len(batches):
        logger.warning("%s has only %d of %d training files: %s", folder, len(present), len(batches), present)
    images, labels = [], []
    for path in (folder / batch for batch in present):
        data, batch_labels = _entries(path, "data", label_key)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(batch_labels), 3072):
            found = f"{getattr(data, 'dtype', type(data))} {np.shape(data)}"
            raise DataError(f"{path}: images must be uint8 (n, 3072) for n = {len(batch_labels)} labels, found {found}")
        images.append(data.reshape(-1, 3, 32, 32))
        labels.extend(batch_labels)
    names = range(info.num_classes)
    if (folder / meta).is_file():
        (names,) = _entries(folder / meta, names_key)
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    return ArrayDataset(info, np.concatenate(images), labels, names)


def _entries(path: Path, *keys: str) -> list:
    content = load_arrays(path)
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise DataError(f"{path} is not a CIFAR file: it has no entry {key!r}")
    return [content[key] for key in keys]


# The statistics of Fashion-MNIST and the digits are those of their training images as they are given here.
@register_dataset(
    replace(
        _CIFAR,
        name="fashion_mnist",
        num_classes=10,
        pixel_mean=(55.8450,) * 3,
        pixel_std=(84.6119,) * 3,
        source=f"{_TORCHVISION.format('FashionMNIST')}, or on Debian and Ubuntu: apt-get install dataset-fashion-mnist",
    )
)
def build_fashion_mnist(info: DatasetInfo, root: str, split: str) -> ArrayDataset:
    """Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist), padded from 28x28 to 32x32, gray as RGB.

    From idx files in ROOT/fashion-mnist, ROOT/FashionMNIST/raw, ROOT, or Debian's package.
    """
    prefix = "train" if split == "train" else "t10k"
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")

    def missing(folder: Path) -> list[str]:
        return [f"{name}.gz" for name in names if not any((folder / f"{name}{end}").is_file() for end in ("", ".gz"))]

    folder = find_folder(info, root, ["fashion-mnist", "FashionMNIST/raw", "", DEBIAN_FOLDER], missing)
    images, labels = (_read_idx(folder / name, num_dims) for name, num_dims in zip(names, (3, 1), strict=True))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return ArrayDataset(info, np.repeat(padded[:, None], 3, axis=1), labels, FASHION)


def _read_idx(path: Path, num_dims: int) -> np.ndarray:
    """The uint8 array of `num_dims` dimensions in an idx file, plain or gzipped."""
    opener, ratio = open, 1
    if not path.is_file():
        # Deflate makes no more of a byte: https://zlib.net/zlib_tech.html
        path, opener, ratio = path.with_name(f"{path.name}.gz"), gzip.open, 1032
    try:
        with opener(path, "rb") as file:
            magic, *shape = struct.unpack(f">{num_dims + 1}I", file.read(4 * (num_dims + 1)))
            # 8 in the third byte is "unsigned byte", the fourth counts the dimensions.
            if magic != 0x800 + num_dims:
                raise ValueError(f"magic number {magic}, expected {0x800 + num_dims}")
            size = math.prod(shape)
            if size > ratio * path.stat().st_size:
                raise ValueError(f"its header announces {size} bytes, more than there can be")
            content = file.read(size)
            if file.read(1):
                raise ValueError(f"there is more than the {size} bytes that its header announces")
            return np.frombuffer(content, dtype=np.uint8).reshape(shape)
    except (struct.error, EOFError, zlib.error, OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable idx file: {error}") from error


@register_dataset(
    replace(
        _CIFAR,
        name="digits",
        num_classes=10,
        pixel_mean=(77.8580,) * 3,
        pixel_std=(82.5531,) * 3,
        augmentation="crop",
        source="it comes with scikit-learn (pip install scikit-learn); no download.",
    )
)
def build_digits(info: DatasetInfo, root: str, split: str) -> ArrayDataset:
    """scikit-learn's 1,797 digits, enlarged from 8x8 to 32x32; ``root`` is not used."""
    images, labels, _ = load_digits_split(split)
    # Values 0..16. All products are multiples of 1/1024 below 2**24, so float32 is exact and so are the pixels.
    gray = torch.from_numpy(images).float()[:, None] * (255 / 16)
    large = F.interpolate(gray, size=(32, 32), mode="bilinear", align_corners=False)
    return ArrayDataset(info, large.round().to(torch.uint8).repeat(1, 3, 1, 1), labels, list("0123456789"))
