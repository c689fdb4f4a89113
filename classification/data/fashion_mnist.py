"""Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist): 28x28 gray, given as 32x32 with three channels."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from d2distill.common.errors import DataError

from .datasets import ArrayDataset, DatasetInfo, find_folder, register_dataset

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def read_idx(path: Path, num_dims: int) -> np.ndarray:
    """The uint8 array in an idx file of `num_dims` dimensions, plain or gzipped (by its ending).

    Raises:
        DataError: not such a file, damaged, or not as long as its header says; the message names it.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            magic, *shape = struct.unpack(f">{num_dims + 1}I", file.read(4 * (num_dims + 1)))
            # 8 in the third byte is "unsigned byte", the fourth counts the dimensions.
            if magic != 0x800 + num_dims:
                raise ValueError(f"magic number {magic}, expected {0x800 + num_dims}")
            return np.frombuffer(file.read(), dtype=np.uint8).reshape(shape)
    except (struct.error, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise DataError(f"{path} is not a readable idx file: {error}") from error


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
        model_family="cifar",
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
        lambda folder: [f"{name}.gz" for name in names if not _file(folder, name).is_file()],
    )
    images, labels = (read_idx(_file(folder, name), num_dims) for name, num_dims in zip(names, (3, 1), strict=True))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return ArrayDataset(info, np.repeat(padded[:, None], 3, axis=1), labels, CLASSES)
