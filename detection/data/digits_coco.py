"""digits_coco: a detection data set that needs no download, generated from scikit-learn's digits on first use.

It is in COCO's format, has ten classes, and lies in the folder of Detectron2's data sets::

    digits_coco/annotations/{train,val}.json  train/000000.png ...  val/000000.png ...

Registered are digits_coco_train and _val (400 and 100 images), digits_coco_large_train and _val (2,000 and 500).
"""

import json
import logging
import os
import shutil
from pathlib import Path
from secrets import token_hex
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

__all__ = ["CLASSES", "SETS", "ensure_generated", "generate_split", "register"]

CLASSES = [str(digit) for digit in range(10)]
# Images per split.
SETS = {"digits_coco": {"train": 400, "val": 100}, "digits_coco_large": {"train": 2000, "val": 500}}
SEEDS = {"digits_coco": 0, "digits_coco_large": 1}

logger = logging.getLogger(__name__)


def generate_split(folder: str | os.PathLike, split: str, num_images: int, seed: int) -> None:
    """Write `num_images` images of a split's digits to FOLDER/SPLIT, and FOLDER/annotations/SPLIT.json.

    Each image is a function of (seed, "train" or "val", its number), and no digit appears in both splits. Beside COCO's
    own keys an annotation has "source": the position of its digit in scikit-learn's data.
    """
    folder = Path(folder)
    digits, labels, sources = load_digits_split(split)
    for name in (split, "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(num_images):
        # RandomState, because NumPy guarantees its numbers and not those of default_rng.
        image, drawn = draw_scene(np.random.RandomState([seed, int(split == "val"), number]), digits)
        height, width = image.shape[:2]
        images.append({"id": number + 1, "file_name": f"{number:06d}.png", "height": height, "width": width})
        Image.fromarray(image).save(folder / split / images[-1]["file_name"])
        for digit in drawn:
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
    content = {
        "info": {"description": f"scikit-learn's digits on textured ground, {split}", "version": "1"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": n, "name": name, "supercategory": "digit"} for n, name in enumerate(CLASSES, 1)],
    }
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))


def ensure_generated(name: str) -> Path:
    """Return the folder of "digits_coco" or "digits_coco_large", after generating it if it does not exist.

    Several processes may call this at once: one generates, in a temporary folder that is renamed when it is complete.

    Raises:
        ImportError: scikit-learn is not installed.
        DataError: the folder cannot be written, or exists without annotations.
    """
    folder = data_path(name)
    # Of a name that nobody can know before, as somebody may have put a link to elsewhere there.
    temporary = folder.with_name(f".{name}.{token_hex(8)}.tmp")
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(str(folder)):
                if not folder.exists():  # another process may have generated it meanwhile
                    logger.info("Generating the data set %s in %s", name, folder)
                    for stale in folder.parent.glob(f".{name}.*tmp"):  # of calls that were cut off
                        shutil.rmtree(stale, ignore_errors=True)
                    for split, num_images in SETS[name].items():
                        generate_split(temporary, split, num_images, SEEDS[name])
                    temporary.rename(folder)
    except OSError as error:
        raise DataError(
            f"cannot generate the data set {name} in {folder.parent}: {error}. Set {ROOT_VARIABLE} to a folder that is "
            "writable"
        ) from error
    if not all(Path(_paths(folder, split)["json_file"]).is_file() for split in SETS[name]):
        raise DataError(f"{folder} is not a complete {name}: move it away, and it is generated again")
    return folder


def register() -> None:
    """Register the four data sets with Detectron2. Their folder is looked up when they are loaded."""
    for name, splits in SETS.items():
        for split in splits:
            DatasetCatalog.register(f"{name}_{split}", lambda name=name, split=split: _load(name, split))
            metadata = MetadataCatalog.get(f"{name}_{split}")
            metadata.set(thing_classes=CLASSES, evaluator_type="coco", **_paths(data_path(name), split))


def _load(name: str, split: str) -> list[dict[str, Any]]:
    paths = _paths(ensure_generated(name), split)
    metadata = MetadataCatalog.get(f"{name}_{split}")
    # DETECTRON2_DATASETS may have changed since the registration, and Detectron2's metadata cannot be overwritten.
    for key in paths:
        delattr(metadata, key)
    metadata.set(**paths)
    return load_coco_json(**paths, dataset_name=f"{name}_{split}")


def _paths(folder: Path, split: str) -> dict[str, str]:
    return {"json_file": str(folder / "annotations" / f"{split}.json"), "image_root": str(folder / split)}
