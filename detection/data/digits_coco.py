"""digits_coco: a detection data set that needs no download, made of scikit-learn's digits on first use.

COCO's format, ten classes, in the folder of Detectron2's data sets::

    digits_coco/annotations/{train,val}.json  train/000000.png ...  val/000000.png ...

Registered are digits_coco_train and _val (400 and 100 pictures), digits_coco_large_train and _val (2,000 and 500).
"""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from PIL import Image

from d2distill.common.data.digits import load_digits_split
from d2distill.common.data.locate import ROOT_VARIABLE, data_path
from d2distill.common.errors import DataError

from .digits_scene import draw_scene

__all__ = ["CLASSES", "SETS", "make", "prepare", "register"]

CLASSES = [str(digit) for digit in range(10)]
# Pictures per split.
SETS = {"digits_coco": {"train": 400, "val": 100}, "digits_coco_large": {"train": 2000, "val": 500}}
SEEDS = {"digits_coco": 0, "digits_coco_large": 1}
# Of the pictures: what an older version made is made anew.
VERSION = 1
MANIFEST = "manifest.json"

logger = logging.getLogger(__name__)


def make(folder: str | os.PathLike, split: str, num_images: int, seed: int) -> None:
    """Draw `num_images` pictures of a split's digits into FOLDER/SPLIT, and FOLDER/annotations/SPLIT.json.

    Each picture is a function of (seed, split, its number). No digit is in pictures of both splits. Beside COCO's own
    keys an annotation has "source": the position of its digit in scikit-learn's data.

    Args:
        split: "train" or "val".

    Raises:
        ImportError: scikit-learn is not installed.
    """
    folder = Path(folder)
    for name in (split, "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    digits, labels, sources = load_digits_split(split)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(num_images):
        # RandomState, since NumPy has frozen its numbers.
        scene = draw_scene(np.random.RandomState([seed, int(split == "val"), number]), digits)
        height, width = scene.image.shape[:2]
        images.append({"id": number + 1, "file_name": f"{number:06d}.png", "height": height, "width": width})
        Image.fromarray(scene.image).save(folder / split / images[-1]["file_name"])
        for digit in scene.digits:
            outlines = mask_util.merge(mask_util.frPyObjects(digit.polygons, height, width))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": int(labels[digit.position]) + 1,
                    "bbox": list(digit.box),
                    "area": int(mask_util.area(outlines)),
                    "iscrowd": 0,
                    "segmentation": digit.polygons,
                    "source": int(sources[digit.position]),
                }
            )
    categories = [{"id": n, "name": name, "supercategory": "digit"} for n, name in enumerate(CLASSES, 1)]
    content = {
        "info": {"description": f"scikit-learn's digits on textured ground, {split}", "version": str(VERSION)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))


def prepare(name: str) -> Path:
    """The folder of "digits_coco" or "digits_coco_large"; made if it is not there, or not complete.

    Any number of processes may call it at once: one makes the set, in a folder beside that is renamed at the end.

    Raises:
        ImportError: scikit-learn is not installed.
        DataError: the folder of the data sets cannot be written to.
    """
    folder = data_path(name)
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(folder)):
            if not _is_complete(folder):  # another process may have made it meanwhile
                _make_set(name, folder)
    except OSError as error:
        raise DataError(
            f"the data set {name} cannot be made in {folder.parent}: {error}. Set {ROOT_VARIABLE} to a folder that can "
            "be written to"
        ) from error
    return folder


def register() -> None:
    """Register the four sets in Detectron2's catalogs. Where they are is looked up when they are loaded."""
    for name, splits in SETS.items():
        for split in splits:
            DatasetCatalog.register(f"{name}_{split}", lambda name=name, split=split: _load(name, split))
            MetadataCatalog.get(f"{name}_{split}").set(
                thing_classes=CLASSES, evaluator_type="coco", made_on_use=True, **_paths(data_path(name), split)
            )


def _load(name: str, split: str) -> list[dict[str, Any]]:
    paths = _paths(prepare(name), split)
    # Metadata refuses new values, but the folder of the data sets may have been set since the registration.
    vars(MetadataCatalog.get(f"{name}_{split}")).update(paths)
    return load_coco_json(paths["json_file"], paths["image_root"], f"{name}_{split}")


def _paths(folder: Path, split: str) -> dict[str, str]:
    return {"json_file": str(folder / "annotations" / f"{split}.json"), "image_root": str(folder / split)}


def _make_set(name: str, folder: Path) -> None:
    """Make a set and put it in the place of an incomplete one. The caller holds the lock."""
    prefix = f".{folder.name}.making-"
    for left_over in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_over)
    logger.info("Drawing the data set %s into %s", name, folder)
    making = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        new = making / "new"
        for split, num_images in SETS[name].items():
            make(new, split, num_images, SEEDS[name])
        files = _sizes(new)
        (new / MANIFEST).write_text(json.dumps({"version": VERSION, "files": files}))
        if folder.exists():
            foreign = _sizes(folder).keys() - files.keys()
            if foreign:
                raise DataError(
                    f"{folder} is not a complete {name}, and has files of another origin (such as {min(foreign)}): "
                    "move it away, and it is made anew"
                )
            folder.rename(making / "old")
        new.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder but the manifest, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _is_complete(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["version"] == VERSION and manifest["files"].items() <= _sizes(folder).items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
