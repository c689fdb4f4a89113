"""Data sets that are folders of image files: ImageNet, Tiny-ImageNet and any folder of the user's."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, has_file_allowed_extension, make_dataset

from common.errors import DataError

from .datasets import IMAGENET_MEAN, IMAGENET_STD, DatasetInfo, FileDataset, register_dataset
from .locate import find_folder

logger = logging.getLogger(__name__)


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _is_image(path: str) -> bool:
    # "._x.jpg" are what macOS leaves beside the files of an archive.
    return has_file_allowed_extension(path, IMG_EXTENSIONS) and not os.path.basename(path).startswith(".")


def class_folders(folder: Path, skip: Sequence[str] = ()) -> list[str]:
    """Names of the class folders, sorted; hidden folders (.git, .ipynb_checkpoints) are none.

    Raises:
        FileNotFoundError: there are none.
    """
    try:
        names = [name for name in find_classes(folder)[0] if not name.startswith(".") and name not in skip]
    except FileNotFoundError:
        names = []
    if not names:
        raise FileNotFoundError(f"{folder} has no class folders: images must be in {folder}/<class>/<image file>")
    return names


def list_images(folder: Path, names: Sequence[str], classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """Image files below ``folder/<name>`` at any depth, as paths relative to ``folder``, and labels.

    Args:
        names: class folders to read.
        classes: all class names, in label order.

    Raises:
        DataError: a folder that is not among the classes.
        FileNotFoundError: a class folder without images.
    """
    index = {name: label for label, name in enumerate(classes)}
    if unknown := [name for name in names if name not in index]:
        raise DataError(f"{folder} has class folders that the training images do not have: {_some(unknown)}")
    samples = make_dataset(folder, {name: index[name] for name in names}, is_valid_file=_is_image, allow_empty=True)
    present = {label for _, label in samples}
    if empty := [name for name in names if index[name] not in present]:
        raise FileNotFoundError(
            f"{folder} has class folders without images ({'/'.join(IMG_EXTENSIONS)}): {_some(empty)}"
        )
    prefix = len(str(folder)) + 1
    return [path[prefix:] for path, _ in samples], [label for _, label in samples]


def _find(info: DatasetInfo, root: str, folders: Sequence[str], split: str) -> Path:
    needed = ("train",) if split == "train" else ("train", "val")
    return find_folder(info, root, folders, lambda folder: [name for name in needed if not (folder / name).is_dir()])


def _train_classes(info: DatasetInfo, folder: Path) -> tuple[DatasetInfo, list[str]]:
    """The class folders of the training images, and `info` with their number."""
    classes = class_folders(folder / "train")
    if info.num_classes not in (None, len(classes)):
        logger.warning(
            "%s has %d class folders, but %s as published has %d: networks get %d classes, and a checkpoint trained "
            "on all of them does not fit",
            folder / "train",
            len(classes),
            info.name,
            info.num_classes,
            len(classes),
        )
    return replace(info, num_classes=len(classes)), classes


def _image_folder(info: DatasetInfo, folder: Path, split: str) -> FileDataset:
    info, classes = _train_classes(info, folder)
    names = classes if split == "train" else class_folders(folder / "val")
    return FileDataset(info, folder / split, *list_images(folder / split, names, classes), classes)


@register_dataset(
    DatasetInfo(
        name="imagenet",
        num_classes=1000,
        image_size=224,
        pixel_mean=IMAGENET_MEAN,
        pixel_std=IMAGENET_STD,
        zoo="imagenet",
        augmentation="resized_crop_flip",
        source="ask for the ILSVRC2012 archives (train, val, devkit) at https://www.image-net.org/download.php, put "
        'them into ROOT/imagenet and unpack them: python -c "import torchvision; '
        "[torchvision.datasets.ImageNet('ROOT/imagenet', split) for split in ('train', 'val')]\"",
    )
)
def build_imagenet(info: DatasetInfo, root: str, split: str) -> FileDataset:
    """ImageNet-1k from ROOT/imagenet/{train,val}/<wnid>/."""
    return _image_folder(info, _find(info, root, ["imagenet", ""], split), split)


@register_dataset(
    DatasetInfo(
        name="folder",
        num_classes=None,
        image_size=224,
        pixel_mean=IMAGENET_MEAN,
        pixel_std=IMAGENET_STD,
        zoo="imagenet",
        augmentation="resized_crop_flip",
        source="put your images into ROOT/train/<class>/ and ROOT/val/<class>/.",
    )
)
def build_folder(info: DatasetInfo, root: str, split: str) -> FileDataset:
    """Any images in ROOT/{train,val}/<class>/; the classes are the folders of ROOT/train, sorted."""
    return _image_folder(info, _find(info, root, [""], split), split)


def _annotated_images(folder: Path, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """Tiny-ImageNet's validation images by val_annotations.txt: file, wnid and a box, separated by tabs."""
    index = {name: label for label, name in enumerate(classes)}
    annotations = folder / "val_annotations.txt"
    labels = {}
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        file, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in index:
            raise DataError(f"{annotations}, line {number}: class {wnid!r} is not among the training classes")
        labels[os.path.join("images", file)] = index[wnid]
    present = {os.path.join("images", name) for name in os.listdir(folder / "images") if _is_image(name)}
    if absent := sorted(labels.keys() - present):
        raise FileNotFoundError(f"{annotations} names files that are not there: {_some(absent)}")
    if extra := sorted(present - labels.keys()):
        raise DataError(f"{annotations} has no class for {_some(extra)}")
    return list(labels), list(labels.values())


@register_dataset(
    DatasetInfo(
        name="tiny_imagenet",
        num_classes=200,
        image_size=64,
        pixel_mean=(0.4802 * 255, 0.4481 * 255, 0.3975 * 255),
        pixel_std=(0.2302 * 255, 0.2265 * 255, 0.2262 * 255),
        zoo="tiny_imagenet",
        augmentation="rotate_flip",
        source="download http://cs231n.stanford.edu/tiny-imagenet-200.zip and unzip it in ROOT.",
    )
)
def build_tiny_imagenet(info: DatasetInfo, root: str, split: str) -> FileDataset:
    """Tiny-ImageNet from ROOT/tiny-imagenet-200, as published or with its validation images sorted by class.

    Labels number the wnids of the training folder in sorted order.
    """
    folder = _find(info, root, ["tiny-imagenet-200", ""], split)
    info, classes = _train_classes(info, folder)
    if split == "train":
        return FileDataset(info, folder / "train", *list_images(folder / "train", classes, classes), classes)
    val = folder / "val"
    # Scripts that sort the images by class leave val_annotations.txt, and often an empty val/images, behind.
    original = (val / "val_annotations.txt").is_file() and (val / "images").is_dir()
    if original and any(_is_image(name) for name in os.listdir(val / "images")):
        return FileDataset(info, val, *_annotated_images(val, classes), classes)
    return FileDataset(info, val, *list_images(val, class_folders(val, skip=("images",)), classes), classes)
