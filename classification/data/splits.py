"""The training and test images of a configuration: opened, divided where they are one folder, classes in order."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from d2distill.classification.data.datasets import (
    FileDataset,
    ImageDataset,
    ImageSelection,
    build_dataset,
    shortened,
)
from d2distill.common.building import building
from d2distill.common.config import CfgNode
from d2distill.common.config_node import absolute_file
from d2distill.common.errors import ConfigError
from d2distill.common.files import regular_file

__all__ = ["load_splits", "load_test_set", "read_class_names", "read_options", "split_positions"]

logger = logging.getLogger("detectron2.d2distill")


def load_splits(cfg: CfgNode) -> tuple[ImageDataset, ImageDataset]:
    """The training and the test images that DATASETS and INPUT describe."""
    if cfg.DATASETS.VAL_FRACTION:
        return _divided(cfg)
    return _open(cfg, "train"), _open(cfg, "val")


def load_test_set(cfg: CfgNode) -> ImageDataset:
    """The test images alone; the training images need not be there, unless DATASETS.VAL_FRACTION divides them."""
    return _divided(cfg)[1] if cfg.DATASETS.VAL_FRACTION else _open(cfg, "val")


def _open(cfg: CfgNode, split: str) -> ImageDataset:
    names = read_class_names(cfg.DATASETS.CLASSES)
    with building("DATASETS", cfg):
        dataset = build_dataset(cfg.DATASETS.NAME, cfg.DATASETS.ROOT, split)
    if isinstance(dataset, FileDataset):
        dataset.read_options = read_options(cfg)
    if not names:
        return dataset
    left_out = [name for name in dataset.classes if name not in names]
    # Test images alone may be of some classes only.
    unknown = [name for name in names if name not in dataset.classes] if split == "train" or left_out else []
    if left_out or unknown:
        lacks, has = (shortened(names) or "none" for names in (left_out, unknown))
        raise ConfigError(
            f"DATASETS.CLASSES must name the classes of the {split} images, all and no other: it lacks {lacks}; those "
            f"that are not there: {has}"
        )
    return ImageSelection.with_classes(dataset, names)


def read_options(cfg: CfgNode) -> dict[str, Any]:
    """INPUT's keyword arguments of :func:`.read_image`."""
    return {"exif_orientation": cfg.INPUT.EXIF_ORIENTATION, "range_16bit": list(cfg.INPUT.RANGE_16BIT)}


def read_class_names(value: str | Sequence[str]) -> list[str]:
    """Class names in order, from a list or a file.

    Args:
        value: names, or a file: one name a line, or JSON: a list, ``{name: position}`` as torchvision's
            ``class_to_idx``, or an object with one of them under "classes", as a run's ``student.json``.

    Raises:
        ConfigError: no such file, or something else in it; a name that is there twice.
    """
    if not value:
        return []
    source, names = "DATASETS.CLASSES", value
    if isinstance(value, str):
        source = f"DATASETS.CLASSES {value}"
        try:
            with open(regular_file(absolute_file(value)), encoding="utf-8-sig") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source} is no list of names, and no text file that can be read: {error}") from error
        names = [name for line in text.splitlines() if (name := line.strip())]
        if value.endswith(".json"):
            try:
                names = _names_in_json(json.loads(text))
            except (RecursionError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{source}: no list of names, and no object of names and positions: {error}"
                ) from error
    if twice := {name for name, number in Counter(names).items() if number > 1}:
        raise ConfigError(f"{source} names a class twice: {', '.join(sorted(twice))}")
    return list(names)


def _names_in_json(content: list | dict) -> list[str]:
    content = content.get("classes", content) if isinstance(content, dict) else content
    if isinstance(content, dict):
        if sorted(content.values()) != list(range(len(content))):
            raise ValueError(f"positions must be 0 to {len(content) - 1}")
        content = sorted(content, key=content.get)
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"found {str(content)[:50]}")
    return content


def _divided(cfg: CfgNode) -> tuple[ImageDataset, ImageDataset]:
    fraction, seed, whole = cfg.DATASETS.VAL_FRACTION, cfg.DATASETS.SPLIT_SEED, _open(cfg, "train")
    parts = [ImageSelection(whole, positions) for positions in split_positions(whole, fraction, seed)]
    logger.info(
        f"DATASETS.VAL_FRACTION {fraction}: {len(parts[1])} of the {len(whole)} training images are set apart, of each "
        f"class its share, by SPLIT_SEED {seed}; they take the place of the data set's own test images"
    )
    return tuple(parts)


def split_positions(dataset: ImageDataset, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of a training and a validation part, each in order.

    Of a class of n images ``round(fraction * n)`` are for validation, but at least one for each part where it has two
    or more. The draw does not depend on the order of the classes. In multi-label data, where an image counts for all
    its classes, the shares are met from the rarest class on, as far as the images allow, after Sechidis et al.: On the
    Stratification of Multi-label Data, ECML PKDD 2011; images without a class are divided like a class of their own.
    """
    order = np.random.default_rng(seed).permutation(len(dataset))
    labels = dataset.labels.numpy()
    if dataset.info.multi_label:
        members = [order[labels[order, c]] for c in range(dataset.num_classes)]
        members.append(order[~labels[order].any(1)])
    else:
        by_class = order[np.argsort(labels[order], kind="stable")]
        members = np.split(by_class, np.cumsum(np.bincount(labels, minlength=dataset.num_classes))[:-1])
    held_out, decided = (np.zeros(len(dataset), bool) for _ in range(2))
    # Of equally many the one that begins first in the draw: not by the classes' order.
    for positions in sorted((m for m in members if len(m)), key=lambda m: (len(m), m.tolist())):
        wanted = min(max(round(fraction * len(positions)), 1), len(positions) - 1)
        free = positions[~decided[positions]]
        held_out[free[: max(wanted - held_out[positions].sum(), 0)]] = True
        decided[positions] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
