"""What files in COCO's format must hold, checked as they are read: nothing of it stops a training in its middle.

Three rules, for training and test sets alike, each with the number of entries and the first ids:

* What cannot be read as it is meant is refused: entries without a key, text for numbers, ids that are there twice.
* Annotations of images that the file does not list are left out, as Detectron2 and COCO's evaluation do.
* Annotations whose box covers nothing of its image (no width or height, or outside) are left out of a training, as
  Detectron2's mapper does with each batch. In a test set they stay, and count as not found: AP is COCO's own. Where no
  object is left the file is refused.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from operator import itemgetter
from reprlib import repr as short_repr
from typing import Any
from unittest.mock import patch

import numpy as np
from pycocotools import coco, mask

from d2distill.common.engine.weight_files import first_few
from d2distill.common.errors import DataError

__all__ = ["check_content", "checked_coco"]

logger = logging.getLogger("detectron2.d2distill")

Entry = dict[str, Any]
_NUMBERS = (int, float)
#: Boxes become 32-bit floats. Masks are drawn, in memory for each pixel, and for each of an outline.
_LARGEST_BOX, _LARGEST_OUTLINE, _LARGEST_MASK = 3e38, 1e6, 2**31
_RLE_LETTERS = frozenset(map(chr, range(48, 112)))
#: Of the width and height of a box, in pixels, what is nothing to Detectron2.
_NOTHING = 1e-5


@contextmanager
def checked_coco(check: Callable[[Entry], None]) -> Iterator[None]:
    """While it is open, `check` is given the content of each file that ``pycocotools.coco.COCO`` reads, to change it.

    Detectron2 reads a file by that class and keeps its content for itself, and COCO's takes too long to be read twice.
    """

    class CheckedCOCO(coco.COCO):
        def createIndex(self) -> None:
            check(self.dataset)
            super().createIndex()

    with patch.object(coco, "COCO", CheckedCOCO):
        yield


def check_content(
    content: Entry, name: str, key: str, file: str, training: bool, masks: bool = False, keypoints: bool = False
) -> None:
    """Apply the rules of this module to a file's content; the log warns of what is left out.

    Args:
        content: what the file holds. Annotations are taken out of it.
        name, key, file: the data set's, the setting that names it, and where it was read.
        training: else it is a test set, which AP is computed of.
        masks, keypoints: whether the model has them.

    Raises:
        DataError: the file is refused.
    """
    where = f"data set {name}: {file}"
    lists = {kind: content.get(kind, []) for kind in ("images", "categories", "annotations")}
    for kind, entries in lists.items():
        if not isinstance(entries, list) or not set(map(type, entries)) <= {dict}:
            raise DataError(f"{where}: '{kind}' is not a list of objects")
        if not entries and kind != "annotations":
            raise DataError(f"{where} has no '{kind}'")
    images, categories, annotations = lists.values()
    _refuse(where, "images", images, {**_id_rules(images), **_IMAGE_RULES})
    _refuse(where, "categories", categories, {**_id_rules(categories), **_CATEGORY_RULES})
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    known = {category["id"] for category in categories}
    rules = _annotation_rules(known, sizes, training, masks, keypoints)
    # The minival sets of COCO 2014 have some twice, which Detectron2 lets pass.
    _refuse(where, "annotations", annotations, rules, unique="minival" not in file)
    if missing := set(map(itemgetter("image_id"), annotations)) - sizes.keys():
        strays = [entry for entry in annotations if entry["image_id"] in missing]
        logger.warning(
            f"{key}: {name}: {_count(strays, annotations)} are left out: no such image is listed{_ids(strays)}"
        )
        content["annotations"] = annotations = [entry for entry in annotations if entry["image_id"] not in missing]
    covers = _covers_something(annotations, sizes)
    if covers.all():
        return
    useless = [annotations[at] for at in np.flatnonzero(~covers)]
    if not any(covers[at] for at, entry in enumerate(annotations) if not entry.get("iscrowd")):
        box, size = useless[0]["bbox"], sizes[useless[0]["image_id"]]
        raise DataError(
            f"{where}: no object has a box with a width and a height inside its image, e.g. that of id "
            f"{short_repr(useless[0]['id'])} is {box} in an image of {size[0]} x {size[1]}: it must be [x, y, width, "
            "height] in pixels"
        )
    what = "are left out" if training else "can be found by no detector, and lower AP"
    logger.warning(
        f"{key}: {name}: {_count(useless, annotations)} {what}: their boxes cover nothing of their images (no width or "
        f"height, or outside){_ids(useless)}"
    )
    if training:
        content["annotations"] = [annotations[at] for at in np.flatnonzero(covers)]


def _refuse(
    where: str, kind: str, entries: list[Entry], rules: Mapping[str, Callable[[Entry], bool]], unique: bool = True
) -> None:
    """Raise a DataError that names the first rule that an entry breaks."""
    for what, holds in rules.items():
        if not all(map(holds, entries)):
            bad = [entry for entry in entries if not holds(entry)]
            raise DataError(f"{where}: {_count(bad, entries, kind)} {what}{_ids(bad)}")
    if unique and len(set(map(itemgetter("id"), entries))) < len(entries):
        ids = Counter(map(itemgetter("id"), entries))
        bad = [entry for entry in entries if ids[entry["id"]] > 1]
        raise DataError(
            f"{where}: {_count(bad, entries, kind)} share their id with another{_ids(bad)}; give each one of its own"
        )


def _count(some: Collection[Entry], of: Collection[Entry], kind: str = "annotations") -> str:
    return f"{len(some)} of {len(of)} {kind}"


def _ids(entries: Iterable[Entry]) -> str:
    # Escaped and shortened; an entry without one is shown itself.
    return f" (id {first_few(dict.fromkeys(short_repr(entry.get('id', entry)) for entry in entries))})"


def _is_id(value: Any) -> bool:
    """Whether it is text, or a whole number of no more than 64 bits (tables write those of a column as floats)."""
    return type(value) is str or (type(value) in _NUMBERS and -(2.0**63) < value < 2.0**63 and value == int(value))


_ID_RULES = {"have no id, in text or a whole number": lambda entry: _is_id(entry.get("id"))}


def _id_rules(entries: list[Entry]) -> dict[str, Callable[[Entry], bool]]:
    """Of entries that Detectron2 sorts by their ids."""
    first = type(entries[0].get("id")) is str
    what = "have an id in text where others have numbers, or the other way"
    return {**_ID_RULES, what: lambda entry: (type(entry["id"]) is str) == first}


_CATEGORY_RULES = {"have no name": lambda category: type(category.get("name")) is str}
_IMAGE_RULES = {
    "have no file_name": lambda image: type(image.get("file_name")) is str and image["file_name"] != "",
    "have no width and height in pixels": lambda image: all(
        type(image.get(side)) in _NUMBERS and 0 < image[side] < _LARGEST_BOX for side in ("width", "height")
    ),
}


def _annotation_rules(
    categories: Collection[Any], sizes: Mapping[Any, tuple[float, float]], training: bool, masks: bool, keypoints: bool
) -> dict[str, Callable[[Entry], bool]]:
    """What must hold of each annotation, by what is wrong where it does not."""
    rules = {
        **_ID_RULES,
        "have no image_id": lambda entry: _is_id(entry.get("image_id")),
        "have a category_id that 'categories' does not list": lambda entry: (
            _is_id(entry.get("category_id")) and entry["category_id"] in categories
        ),
        "have an iscrowd that is neither 0 nor 1": lambda entry: entry.get("iscrowd", 0) in (0, 1),
        "are to be ignored ('ignore'), which Detectron2 does not know: make them crowds": lambda entry: (
            entry.get("ignore", 0) == 0
        ),
        "have a bbox that is not [x, y, width, height] in finite numbers": lambda entry: (
            _is_list_of_numbers(entry.get("bbox"), _LARGEST_BOX) and len(entry["bbox"]) == 4
        ),
        "have keypoints that are not a list of finite numbers": lambda entry: (
            not entry.get("keypoints") or _is_list_of_numbers(entry["keypoints"], _LARGEST_BOX)
        ),
        "have a segmentation that is neither a list of polygons nor a run-length code of its image": lambda entry: (
            not entry.get("segmentation") or _is_segmentation(entry, sizes, masks, decoded=masks and not training)
        ),
    }
    if training:
        return rules
    # What COCO's evaluation takes for granted.
    rules["have no area, which AP of small, medium and large objects needs: add it, in pixels"] = lambda entry: (
        type(entry.get("area")) in _NUMBERS and abs(entry["area"]) < _LARGEST_BOX
    )
    if masks:
        rules["have no segmentation, which AP of masks needs: add it, or set MODEL.MASK_ON to False"] = lambda entry: (
            bool(entry.get("segmentation"))
        )
    if keypoints:
        rules["have no keypoints and num_keypoints, which AP of key points needs"] = lambda entry: (
            type(entry.get("keypoints")) is list and type(entry.get("num_keypoints")) is int
        )
    return rules


def _is_list_of_numbers(values: Any, largest: float) -> bool:
    """Whether it is a list of numbers below `largest`, of which none is NaN."""
    try:
        return type(values) is list and all(map(largest.__gt__, map(abs, values)))
    except TypeError:
        return False


def _is_segmentation(entry: Entry, sizes: Mapping[Any, tuple[float, float]], masks: bool, decoded: bool) -> bool:
    """Whether Detectron2 can read it; with `masks` also whether it can be drawn, with `decoded` all of it.

    A training decodes them image by image.
    """
    found = entry["segmentation"]
    if type(found) is list and set(map(type, found)) <= {list}:
        return not masks or _is_list_of_numbers([*chain.from_iterable(found)], _LARGEST_OUTLINE)
    if type(found) is not dict or not _is_list_of_lengths(found.get("size")) or len(found["size"]) != 2:
        return False
    (height, width), counts = found["size"], found.get("counts")
    if masks and (sizes.get(entry["image_id"], (width, height)) != (width, height) or width * height > _LARGEST_MASK):
        return False
    if type(counts) is not str:
        return _is_list_of_lengths(counts) and (not masks or sum(counts) == width * height)
    try:
        # Of six bits a letter, which pycocotools does not look at.
        letters = set(counts) <= _RLE_LETTERS
        return letters and (not decoded or mask.decode(found) is not None)
    except ValueError:
        return False


def _is_list_of_lengths(values: Any) -> bool:
    return _is_list_of_numbers(values, 2.0**32) and set(map(type, values)) <= {int} and min(values, default=0) >= 0


def _covers_something(annotations: list[Entry], sizes: Mapping[Any, tuple[float, float]]) -> np.ndarray:
    """Of each annotation whether its box covers some of its image."""
    boxes = _rows(map(itemgetter("bbox"), annotations), 4)
    ends = _rows(map(sizes.__getitem__, map(itemgetter("image_id"), annotations)), 2)
    inside = np.minimum(boxes[:, :2] + boxes[:, 2:], ends) - np.maximum(boxes[:, :2], 0)
    return (inside > _NOTHING).all(1)


def _rows(values: Iterable[Iterable[float]], width: int) -> np.ndarray:
    return np.fromiter(chain.from_iterable(values), np.float64).reshape(-1, width)
