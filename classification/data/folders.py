"""Data sets that are folders of image files: ImageNet, Tiny-ImageNet and any folder of the user's."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from d2distill.common.errors import DataError

from .datasets import DatasetInfo, FileDataset, find_folder, register_dataset, shortened

logger = logging.getLogger("detectron2.d2distill")


#: Formats that Pillow recognizes, but does not decode by itself.
_NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")


class ImageFiles:
    """Tells image files by their ending, one that Pillow can open, and counts the files that are none.

    Attributes:
        passed_over: number of files and an example, by ending; hidden ones together. "._x.jpg" are what macOS leaves
            beside the files of an archive.
    """

    def __init__(self) -> None:
        formats = Image.registered_extensions()
        self.endings = {ending for ending, kind in formats.items() if kind in Image.OPEN and kind not in _NOT_DECODED}
        self.passed_over: dict[str, tuple[int, str]] = {}

    def __call__(self, path: str) -> bool:
        name = os.path.basename(path)
        ending = os.path.splitext(name)[1].lower()
        hidden = name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")
        if ending in self.endings and not hidden:
            return True
        kind = "hidden" if hidden else ending or "no ending"
        self._pass_over(kind, path)
        return False

    def _pass_over(self, kind: str, path: str) -> None:
        count, example = self.passed_over.get(kind, (0, path))
        self.passed_over[kind] = (count + 1, example)

    def below(self, folder: str) -> list[str]:
        """The image files in `folder` at any depth, also behind links, in the order of torchvision's ImageFolder.

        A link that leads back to a folder above it has no end, and is passed over.
        """
        found: list[tuple[str, list[str]]] = []
        if self._leads_back(folder):
            return []
        for path, folders, names in os.walk(folder, followlinks=True):
            folders[:] = [name for name in folders if not self._leads_back(os.path.join(path, name))]
            found.append((path, sorted(names)))
        files = (os.path.join(path, name) for path, names in sorted(found) for name in names)
        return [file for file in files if self(file)]

    def _leads_back(self, folder: str) -> bool:
        back = os.path.islink(folder) and any(os.path.samefile(folder, above) for above in Path(folder).parents)
        if back:
            self._pass_over("link to a folder above it", folder)
        return back


def _class_folders(folder: Path, skip: str = "") -> list[str]:
    """Names of the class folders but `skip`, sorted; hidden folders (.git, .ipynb_checkpoints) are none."""
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "." and p.name != skip)
    if not names:
        raise FileNotFoundError(f"{folder} has no class folders: images must be in {folder}/<class>/<image file>")
    return names


def _find(info: DatasetInfo, root: str, folders: Sequence[str], split: str) -> Path:
    # Labels are those of the training images wherever there are some; to evaluate, val alone does.
    trained = any(Path(root, folder, "train").is_dir() for folder in folders)
    needed = ("train",) if split == "train" else ("train", "val") if trained else ("val",)
    return find_folder(info, root, folders, lambda folder: [name for name in needed if not (folder / name).is_dir()])


def _train_classes(folder: Path) -> list[str]:
    """The class folders of the training images; none where there are no training images."""
    return _class_folders(folder / "train") if (folder / "train").is_dir() else []


def _image_folder(info: DatasetInfo, folder: Path, split: str, skip: str = "") -> FileDataset:
    """Image files below FOLDER/SPLIT/<class> at any depth."""
    names = _class_folders(folder / split, skip)
    classes = _train_classes(folder) or names
    folder = folder / split
    index = {name: label for label, name in enumerate(classes)}
    if unknown := [name for name in names if name not in index]:
        raise DataError(f"{folder} has class folders that the training images do not have: {shortened(unknown)}")
    files = ImageFiles()
    found = {name: files.below(os.path.join(folder, name)) for name in names}
    if empty := [name for name in names if not found[name]]:
        other = f"; files that it does not open there: {', '.join(files.passed_over)}" if files.passed_over else ""
        raise FileNotFoundError(
            f"{folder} has class folders without images that Pillow opens: {shortened(empty)}{other}"
        )
    if split == "train" and info.num_classes not in (None, len(classes)):
        logger.warning(
            f"{folder} has {len(classes)} class folders, but {info.name} as published has {info.num_classes}: "
            f"networks get {len(classes)} classes, and a checkpoint trained on all of them does not fit"
        )
    prefix = len(str(folder)) + 1
    paths = [path[prefix:] for name in names for path in found[name]]
    labels = [index[name] for name in names for _ in found[name]]
    dataset = FileDataset(replace(info, num_classes=len(classes)), folder, paths, labels, classes)
    dataset.passed_over = files.passed_over
    return dataset


_IMAGENET = DatasetInfo(
    name="imagenet",
    num_classes=1000,
    image_size=224,
    pixel_mean=(0.485 * 255, 0.456 * 255, 0.406 * 255),
    pixel_std=(0.229 * 255, 0.224 * 255, 0.225 * 255),
    model_family="imagenet",
    augmentation="resized_crop_flip",
    source="ask for the ILSVRC2012 archives (train, val, devkit) at https://www.image-net.org/download.php, put "
    'them into ROOT/imagenet and unpack them: python -c "import torchvision; '
    "[torchvision.datasets.ImageNet('ROOT/imagenet', split) for split in ('train', 'val')]\"",
)
_OWN_IMAGES = (
    "put your images into ROOT/train/<class>/ and ROOT/val/<class>/, or into ROOT/<class>/ and set "
    "DATASETS.VAL_FRACTION."
)


@register_dataset(_IMAGENET)
def build_imagenet(info: DatasetInfo, root: str, split: str) -> FileDataset:
    """ImageNet-1k from ROOT/imagenet/{train,val}/<wnid>/; to evaluate, val alone does."""
    return _image_folder(info, _find(info, root, ["imagenet", ""], split), split)


@register_dataset(replace(_IMAGENET, name="folder", num_classes=None, source=_OWN_IMAGES))
def build_folder(info: DatasetInfo, root: str, split: str) -> FileDataset:
    """Any images in ROOT/{train,val}/<class>/; the classes are the folders of ROOT/train (else val), sorted.

    Without the two folders ROOT/<class>/ are the training images, of which DATASETS.VAL_FRACTION sets some apart.
    """
    folder = Path(root)
    undivided = not any((folder / name).is_dir() for name in ("train", "val")) and folder.is_dir()
    if undivided and any(p.is_dir() and p.name[0] != "." for p in folder.iterdir()):
        if split == "train":
            return _image_folder(info, folder, "")
        raise DataError(
            f"{folder} has class folders, but neither train nor val: set DATASETS.VAL_FRACTION, e.g. to 0.2, to set "
            "images of each class apart for evaluation, or sort the images into train/<class> and val/<class>"
        )
    return _image_folder(info, _find(info, root, [""], split), split)


def _annotations(folder: Path, classes: Sequence[str], files: ImageFiles) -> dict[str, str]:
    """Class by file of Tiny-ImageNet's validation images: val_annotations.txt has file, wnid and a box, by tabs."""
    annotations = folder / "val_annotations.txt"
    wnids: dict[str, str] = {}
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), start=1):
        file, wnid, *_ = f"{line}\t".split("\t")
        if not wnid or (classes and wnid not in classes):
            raise DataError(f"{annotations}, line {number}: class {wnid!r} is not among the training classes")
        wnids[os.path.join("images", file)] = wnid
    present = {os.path.join("images", name) for name in sorted(os.listdir(folder / "images")) if files(name)}
    if different := sorted(wnids.keys() ^ present):
        raise DataError(f"{annotations} does not name the files that are there: {shortened(different)}")
    return wnids


@register_dataset(
    DatasetInfo(
        name="tiny_imagenet",
        num_classes=200,
        image_size=64,
        pixel_mean=(0.4802 * 255, 0.4481 * 255, 0.3975 * 255),
        pixel_std=(0.2302 * 255, 0.2265 * 255, 0.2262 * 255),
        model_family="tiny_imagenet",
        augmentation="rotate_flip",
        source="download http://cs231n.stanford.edu/tiny-imagenet-200.zip and unzip it in ROOT.",
    )
)
def build_tiny_imagenet(info: DatasetInfo, root: str, split: str) -> FileDataset:
    """Tiny-ImageNet from ROOT/tiny-imagenet-200, as published or with its validation images sorted by class."""
    folder = _find(info, root, ["tiny-imagenet-200", ""], split)
    images = folder / "val" / "images"
    # Scripts that sort the images by class leave val_annotations.txt, and often an empty val/images, behind.
    original = (folder / "val" / "val_annotations.txt").is_file() and images.is_dir()
    original = original and any(map(ImageFiles(), os.listdir(images)))
    if split == "train" or not original:
        return _image_folder(info, folder, split, skip="images")
    classes = _train_classes(folder)
    files = ImageFiles()
    wnids = _annotations(folder / "val", classes, files)
    classes = classes or sorted(set(wnids.values()))
    index = {name: label for label, name in enumerate(classes)}
    info = replace(info, num_classes=len(classes))
    dataset = FileDataset(info, folder / "val", list(wnids), [index[wnid] for wnid in wnids.values()], classes)
    dataset.passed_over = files.passed_over
    return dataset
