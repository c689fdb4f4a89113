"""Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist): 28x28 grey, given as 32x32 with three channels."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from d2distill.common.errors import DataError

from .datasets import ArrayDataset, DatasetInfo, register_dataset
from .locate import find_folder

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def read_idx(path: str | Path, num_dims: int) -> np.ndarray:
    """Read an idx file of unsigned bytes, plain or gzipped (by its ending).

    Args:
        num_dims: 1 for labels, 3 for images.

    Returns:
        A uint8 array of the shape that the header gives.

    Raises:
        DataError: not such a file, damaged, or longer or shorter than its header says; the message names it.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            magic, *shape = struct.unpack(f">{num_dims + 1}I", file.read(4 * (num_dims + 1)))
            # 8 in the third byte is "unsigned byte", the fourth counts the dimensions.
            if magic != 0x800 + num_dims:
                raise ValueError(f"magic number {magic}, expected {0x800 + num_dims}")
            size = math.prod(shape)
            if num_dims == 3 and shape[1:] != [28, 28]:
                raise ValueError(f"images of {shape[1]}x{shape[2]}, expected 28x28")
            data = file.read()
    except (struct.error, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise DataError(f"{path} is not a readable idx file: {error}") from error
    if len(data) != size:
        raise DataError(f"{path} is {'shorter' if len(data) < size else 'longer'} than its header says: {shape}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _file(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_file() else folder / f"{name}.gz"


# python -c "from d2distill.classification.data import *; x = build_dataset('fashion_mnist').images.double(); \
#            print(x.mean(), x.std(correction=0))"
_MEAN = 55.8450
_STD = 84.6119


@register_dataset(
    DatasetInfo(
        name="fashion_mnist",
        num_classes=10,
        image_size=32,
        pixel_mean=(_MEAN,) * 3,
        pixel_std=(_STD,) * 3,
        zoo="cifar",
        augmentation="crop_flip",
        source="""python -c "import torchvision; torchvision.datasets.FashionMNIST('ROOT', download=True)", """
        "or on Debian and Ubuntu: apt-get install dataset-fashion-mnist",
    )
)
def build_fashion_mnist(info: DatasetInfo, root: str, split: str) -> ArrayDataset:
    """Fashion-MNIST from idx files in ROOT/fashion-mnist, ROOT/FashionMNIST/raw, ROOT, or Debian's package."""
    prefix = "train" if split == "train" else "t10k"
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    folder = find_folder(
        info,
        root,
        ["fashion-mnist", "FashionMNIST/raw", "", DEBIAN_FOLDER],
        lambda candidate: [f"{name}.gz" for name in names if not _file(candidate, name).is_file()],
    )
    images, labels = (read_idx(_file(folder, name), num_dims) for name, num_dims in zip(names, (3, 1), strict=True))
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images in {names[0]}, but {len(labels)} labels in {names[1]}")
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return ArrayDataset(info, np.repeat(padded[:, None], 3, axis=1), labels, CLASSES)
