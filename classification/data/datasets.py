"""Data sets: facts that are known before a file is read, labeled images, and a registry of builders."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from d2distill.classification.registry import NamedRegistry
from d2distill.common.data.locate import ROOT_VARIABLE, data_path
from d2distill.common.errors import DataError

Array = np.ndarray | torch.Tensor
Labels = Sequence[int] | Array


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a data set that are known before any file is read.

    Attributes:
        name: the name in the registry (``DATASETS.NAME``).
        num_classes: number of classes; None where it is read from disk.
        image_size: side in pixels of the square images that a network is given.
        pixel_mean, pixel_std: per channel in RGB order, on the 0..255 scale.
        model_family: where bare model names are looked up first: "cifar", "tiny_imagenet" or "imagenet".
        augmentation: name of the training recipe in :mod:`d2distill.classification.data.augment`.
        source: one sentence or command that says how to get the files.
    """

    name: str
    num_classes: int | None
    image_size: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    model_family: str
    augmentation: str
    source: str


class ImageDataset:
    """Labeled images, neither augmented nor normalized: position -> (image, label). Subclasses write :meth:`load`.

    Attributes:
        info: the :class:`DatasetInfo` it was built from.
        classes: class names, in the order of the labels; ``num_classes`` is their number.
        labels: (n,) int64 tensor.

    Raises:
        DataError: no samples, or labels or classes that do not fit ``info``.
    """

    def __init__(self, info: DatasetInfo, labels: Labels, classes: Sequence[str]):
        self.info, self.classes, self.num_classes = info, list(classes), len(classes)
        if info.num_classes not in (None, self.num_classes):
            raise DataError(f"{info.name} has {info.num_classes} classes, but {self.num_classes} were found")
        values = np.asarray(labels)
        if not len(values):
            raise DataError(f"{info.name}: no images")
        whole = values.dtype.kind in "iu"
        if not whole or not 0 <= values.min() <= values.max() < self.num_classes:
            raise DataError(
                f"{info.name}: labels must be whole numbers in 0..{self.num_classes - 1}, found {values.dtype} "
                f"{values.min()}..{values.max()}"
            )
        self.labels = torch.from_numpy(values.astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[torch.Tensor | Image.Image, int]:
        """The image at ``index`` as stored, a uint8 RGB tensor (3, H, W) or an RGB ``PIL.Image``, and its label."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 of the classes, and of which sample has which label; of image files it is their names that count."""
        digest = hashlib.sha256(repr((self.info.name, self.classes)).encode())
        for part in (self.labels, *self._samples()):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def _samples(self) -> list[Array]:
        return []


class ArrayDataset(ImageDataset):
    """Images in memory.

    Attributes:
        images: (n, 3, H, W) uint8 RGB tensor.
    """

    def __init__(self, info: DatasetInfo, images: Array, labels: Labels, classes: Sequence[str]):
        super().__init__(info, labels, classes)
        self.images = torch.as_tensor(images)
        n, shape = len(self.labels), tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[:2] != (n, 3):
            raise DataError(
                f"{info.name}: images must be uint8 (n, 3, H, W) for n = {n} labels, got {self.images.dtype} {shape}"
            )

    def _samples(self) -> list[Array]:
        return [self.images]

    def load(self, index: int) -> tuple[torch.Tensor, int]:
        # A view would let a caller change the data set, and would drag all of it along to another process.
        return self.images[index].clone(), int(self.labels[index])


class FileDataset(ImageDataset):
    """One image file per sample; ``paths`` are relative to ``folder``."""

    def __init__(self, info: DatasetInfo, folder: Path, paths: Sequence[str], labels: Labels, classes: Sequence[str]):
        super().__init__(info, labels, classes)
        self.folder = folder
        # One array, not a million str objects: their reference counts would make every forked worker copy the list.
        self._paths = np.array([os.fsencode(path) for path in paths])

    def _samples(self) -> list[Array]:
        return [self._paths]

    def path(self, index: int) -> str:
        """The file of the sample at ``index``."""
        return os.path.join(self.folder, os.fsdecode(self._paths[index]))

    def load(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.path(index)), int(self.labels[index])


def read_image(path: str | Path) -> Image.Image:
    """Decode an image file as 8-bit RGB; a DataError says what is wrong with it."""
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                raise ValueError(f"pixel mode {image.mode} has no defined range; store the image with 8 or 16 bits")
            if image.mode.startswith("I;16"):
                # PIL's own conversion clips at 255, which turns nearly every 16-bit image white.
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # PIL warns on the direct way; the colors are the same
            return image.convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        reason = str(error) or type(error).__name__
        raise DataError(f"cannot read image {path}: {reason}; repair or replace the file") from error


DATASET_REGISTRY = NamedRegistry("data set")
DatasetBuilder = Callable[[DatasetInfo, str, str], ImageDataset]


def register_dataset(info: DatasetInfo) -> Callable[[DatasetBuilder], DatasetBuilder]:
    """Decorator for a builder ``(info, root, split) -> ImageDataset``; ``root`` is absolute, ``split`` is valid."""

    def decorator(builder: DatasetBuilder) -> DatasetBuilder:
        DATASET_REGISTRY.register_as(info.name)((info, builder))
        return builder

    return decorator


def dataset_info(name: str) -> DatasetInfo:
    """Facts about a data set; reads no file. ValueError for an unknown name."""
    return DATASET_REGISTRY.get(name)[0]


def build_dataset(name: str, root: str | os.PathLike = "", split: str = "train") -> ImageDataset:
    """Open a data set.

    Args:
        name: a name in ``DATASET_REGISTRY``.
        root: folder that holds the data set's folder, or that folder itself. Empty: the environment variable
            ``DETECTRON2_DATASETS``, and without it ``./datasets``.
        split: "train" or "val" (the labeled test images, for sets that call them so).

    Raises:
        ValueError: unknown name or split.
        DataError: files that are not what they should be (the message names the file).
        FileNotFoundError: the files are missing; the message says where they were looked for and how to get them.
    """
    info, builder = DATASET_REGISTRY.get(name)
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, got {split!r}")
    return builder(info, str(data_path(root=root)), split)


def find_folder(info: DatasetInfo, root: str, folders: Sequence[str], missing: Callable[[Path], Sequence[str]]) -> Path:
    """The first of ``folders`` (relative to ``root`` or absolute) where ``missing(folder)`` lists no needed paths.

    Raises:
        FileNotFoundError: there is none. The message lists what is missing, how to get it, how to point to it.
    """
    looked_at = []
    for folder in (Path(root, folder) for folder in folders):
        absent = missing(folder)
        if not absent:
            return folder
        looked_at += [f"\n  {folder / path}" for path in absent]
    raise FileNotFoundError(
        f"data set {info.name!r} not found. Not there:{''.join(looked_at)}\n"
        f"To get it: {info.source.replace('ROOT', root)}\n"
        f"If you have it elsewhere, set DATASETS.ROOT (or the environment variable {ROOT_VARIABLE}) to the folder "
        "that holds it."
    )
