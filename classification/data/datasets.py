"""Data sets: facts that are known before a file is read, labeled images, and a registry of builders."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from d2distill.classification.registry import NamedRegistry
from d2distill.common.data.locate import ROOT_VARIABLE, data_path
from d2distill.common.errors import DataError
from d2distill.common.files import regular_file

Array = np.ndarray | torch.Tensor
Labels = Sequence[int] | Array
#: The range of 16-bit pixels as they are stored.
FULL_16BIT = (0, 65535)


def shortened(names: Iterable[str], limit: int = 5) -> str:
    """The first names, by commas, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


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
        multi_label: an image has any number of the classes, not one.
    """

    name: str
    num_classes: int | None
    image_size: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    model_family: str
    augmentation: str
    source: str
    multi_label: bool = False


class ImageDataset:
    """Labeled images, neither augmented nor normalized: position -> (image, label). Subclasses write :meth:`load`.

    Attributes:
        info: the :class:`DatasetInfo` it was built from.
        classes: class names, in the order of the labels; ``num_classes`` is their number.
        labels: (n,) int64 tensor; of a multi-label data set (n, num_classes) bool.
        passed_over: of the files beside the images their number and an example, by ending or kind.

    Raises:
        DataError: no samples, or labels or classes that do not fit ``info``.
    """

    passed_over: Mapping[str, tuple[int, str]] = {}

    def __init_subclass__(cls) -> None:
        # What is loaded in another way has other pixels.
        if "load" in vars(cls) and "content_digest" not in vars(cls):
            cls.content_digest = ImageDataset.content_digest

    def __init__(self, info: DatasetInfo, labels: Labels, classes: Sequence[str]):
        self.info, self.classes, self.num_classes = info, list(classes), len(classes)
        if info.num_classes not in (None, self.num_classes):
            raise DataError(f"{info.name} has {info.num_classes} classes, but {self.num_classes} were found")
        values = np.asarray(labels)
        if not len(values):
            raise DataError(f"{info.name}: no images")
        if info.multi_label:
            if values.shape != (len(values), self.num_classes) or not np.isin(values, (0, 1)).all():
                raise DataError(
                    f"{info.name}: labels must be 0 or 1 for each of {self.num_classes} classes, found {values.dtype} "
                    f"{values.shape}"
                )
            self.labels = torch.from_numpy(values.astype(bool))
            return
        whole = values.dtype.kind in "iu"
        if not whole or not 0 <= values.min() <= values.max() < self.num_classes:
            raise DataError(
                f"{info.name}: labels must be whole numbers in 0..{self.num_classes - 1}, found {values.dtype} "
                f"{values.min()}..{values.max()}"
            )
        self.labels = torch.from_numpy(values.astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[torch.Tensor | Image.Image, int | torch.Tensor]:
        """The image at ``index`` as stored, a uint8 RGB tensor (3, H, W) or an RGB ``PIL.Image``, and its label."""
        raise NotImplementedError

    def label(self, index: int) -> int | torch.Tensor:
        """The class of the sample at ``index``; of a multi-label data set float (num_classes,), 0 or 1 each."""
        return self.labels[index].float() if self.info.multi_label else int(self.labels[index])

    def path(self, index: int) -> str | None:
        """The file of the sample at ``index``; None where samples have no files of their own."""
        return None

    def samples_per_class(self) -> list[int]:
        """How many samples each class has, in the order of ``classes``."""
        if self.info.multi_label:
            return self.labels.sum(0).tolist()
        return torch.bincount(self.labels, minlength=self.num_classes).tolist()

    def fingerprint(self) -> str:
        """SHA-256 of the classes, and of which sample has which label; of image files it is their names that count."""
        digest = hashlib.sha256(repr((self.info.name, self.classes)).encode())
        for part in (self.labels, *self._samples()):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def content_digest(self) -> str | None:
        """SHA-256 of what decides the pixels of each position: of the pixels, or of files' names, sizes and times.

        None where a class does not say: nothing is then remembered of its images.
        """
        return None

    def _samples(self) -> list[Array]:
        return []


class ImageSelection(ImageDataset):
    """Some samples of a data set, or its classes in another order."""

    def __init__(self, dataset: ImageDataset, positions: Sequence[int] | Array) -> None:
        super().__init__(dataset.info, dataset.labels[positions], dataset.classes)
        self.dataset, self.positions, self.passed_over = dataset, np.asarray(positions), dataset.passed_over

    @classmethod
    def with_classes(cls, dataset: ImageDataset, classes: Sequence[str]) -> "ImageSelection":
        """All samples, labeled by the position of their class in `classes`, which has every class of `dataset`."""
        selection = cls(dataset, np.arange(len(dataset)))
        places = torch.tensor([classes.index(name) for name in dataset.classes])
        selection.info = replace(dataset.info, num_classes=len(classes))
        selection.classes, selection.num_classes = list(classes), len(classes)
        if dataset.info.multi_label:
            labels = torch.zeros(len(dataset), len(classes), dtype=torch.bool)
            labels[:, places] = dataset.labels
            selection.labels = labels
        else:
            selection.labels = places[dataset.labels]
        return selection

    def load(self, index: int) -> tuple[torch.Tensor | Image.Image, int | torch.Tensor]:
        image, _ = self.dataset.load(int(self.positions[index]))
        return image, self.label(index)

    def path(self, index: int) -> str | None:
        return self.dataset.path(int(self.positions[index]))

    def content_digest(self) -> str | None:
        whole = self.dataset.content_digest()
        return None if whole is None else _digest(whole, self.positions)

    def _samples(self) -> list[Array]:
        return [*self.dataset._samples(), self.positions]


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

    def content_digest(self) -> str:
        return _digest(tuple(self.images.shape), self.images.numpy())

    def _samples(self) -> list[Array]:
        return [self.images]

    def load(self, index: int) -> tuple[torch.Tensor, int]:
        # A view would let a caller change the data set, and would drag all of it along to another process.
        return self.images[index].clone(), self.label(index)


class FileDataset(ImageDataset):
    """One image file per sample; ``paths`` are relative to ``folder``.

    Attributes:
        read_options: keyword arguments of :func:`read_image`.
    """

    read_options: Mapping[str, Any] = {}

    def __init__(self, info: DatasetInfo, folder: Path, paths: Sequence[str], labels: Labels, classes: Sequence[str]):
        super().__init__(info, labels, classes)
        self.folder = folder
        # One array, not a million str objects: their reference counts would make every forked worker copy the list.
        self._paths = np.array([os.fsencode(path) for path in paths])

    def _samples(self) -> list[Array]:
        return [self._paths]

    def content_digest(self) -> str:
        files = np.zeros((len(self), 2), np.int64)
        for index in range(len(self)):
            # One that cannot be read is an error elsewhere, or skipped.
            with suppress(OSError):
                stat = os.stat(self.path(index))
                files[index] = stat.st_size, stat.st_mtime_ns
        return _digest(dict(self.read_options), self._paths, files)

    def path(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self._paths[index]))

    def load(self, index: int) -> tuple[Image.Image, int | torch.Tensor]:
        return read_image(self.path(index), **self.read_options), self.label(index)


def _digest(facts: Any, *arrays: np.ndarray) -> str:
    digest = hashlib.sha256(repr(facts).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def read_image(
    path: str | Path, exif_orientation: bool = False, range_16bit: Sequence[float] = FULL_16BIT
) -> Image.Image:
    """Decode an image file, of several frames the first, as 8-bit RGB; a DataError says what is wrong with it.

    The other arguments are those of :func:`to_rgb`.
    """
    try:
        with Image.open(regular_file(path)) as image:
            return to_rgb(image, exif_orientation, range_16bit)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        reason = str(error) or type(error).__name__
        raise DataError(f"cannot read image {path}: {reason}; repair or replace the file") from error


def to_rgb(
    image: Image.Image, exif_orientation: bool = False, range_16bit: Sequence[float] = FULL_16BIT
) -> Image.Image:
    """An image of any mode as 8-bit RGB.

    Args:
        exif_orientation: turn the image as its EXIF data says. Off, as in torchvision's ImageFolder.
        range_16bit: the values of gray images of more than 8 bits that become 0 and 255; others are clipped. Images of
            32 bits, integers or floats, have no usual range: they are taken where it is not the default.
    """
    low, high = range_16bit
    if exif_orientation:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") and (low, high) == FULL_16BIT:
        raise ValueError(
            f"pixel mode {image.mode} has no defined range; store the image with 8 or 16 bits, or set "
            "INPUT.RANGE_16BIT to the lowest and highest value"
        )
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # PIL's own conversion clips at 255, which turns nearly every 16-bit image white. In double precision the
        # division is exact wherever the result is whole.
        values = np.asarray(image).astype(np.float64).clip(low, high)
        image = Image.fromarray(((values - low) * 255 / (high - low)).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns on the direct way; the colors are the same
    return image.convert("RGB")


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
        looked_at += [str(folder / path) for path in absent]
    raise FileNotFoundError(
        f"data set {info.name!r} not found. Not there: {', '.join(looked_at)}. "
        f"To get it: {info.source.replace('ROOT', root).rstrip('.')}. "
        f"If you have it elsewhere, set DATASETS.ROOT (or the environment variable {ROOT_VARIABLE}) to the folder "
        "that holds it."
    )
