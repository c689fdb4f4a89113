"""Data sets by name: registered from the configuration, loaded, and checked before a model sees them."""

import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import filter_images_with_few_keypoints, filter_images_with_only_crowd_annotations
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from d2distill.common.data.locate import ROOT_VARIABLE, data_path
from d2distill.common.errors import ConfigError, DataError, UserError, did_you_mean
from d2distill.detection.config import num_classes

__all__ = ["check_test_sets", "load_test_set", "load_training_set", "register_datasets"]

_KEYS = ("JSON", "IMAGES")
# By name, path and time of the annotations: an evaluation at every period must not read a large file again.
_TEST_SETS: dict[tuple[str, str, float], list[dict[str, Any]]] = {}


def register_datasets(cfg: CfgNode) -> None:
    """Register every entry ``{name: {JSON: annotations, IMAGES: folder}}`` of DATASETS.REGISTER as a COCO set.

    Relative paths are below DETECTRON2_DATASETS, or else ./datasets. What is registered already is left alone.

    Raises:
        ConfigError: keys that are missing or unknown, or a name that stands for another data set.
    """
    for name, entry in cfg.DATASETS.REGISTER.items():
        key = f"DATASETS.REGISTER.{name}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{key} is {entry!r}, but must have the keys {' and '.join(_KEYS)}")
        for given in entry:
            if given not in _KEYS:
                raise ConfigError(f"unknown config key {key}.{given}{did_you_mean(given, _KEYS)}")
        for needed in _KEYS:
            if not isinstance(entry.get(needed), str) or not entry[needed]:
                raise ConfigError(f"{key}.{needed} must be a path, but is {entry.get(needed, 'not there')!r}")
        paths = {"json_file": str(data_path(entry.JSON)), "image_root": str(data_path(entry.IMAGES))}
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, **paths)
            continue
        present = {path: MetadataCatalog.get(name).get(path) for path in paths}
        if present != paths:
            raise ConfigError(
                f"{key}: the name is taken, by a data set with annotations {present['json_file']} and images "
                f"{present['image_root']}; choose another one"
            )


def load_training_set(cfg: CfgNode) -> list[dict[str, Any]]:
    """DATASETS.TRAIN in Detectron2's format, without the images that the configuration filters out.

    Raises:
        ConfigError: a name that is not registered, precomputed proposals, a number of classes that is not the model's,
            masks that are asked for and not there, or sets with different classes.
        FileNotFoundError: annotations or images are missing; says where they were looked for and how to get them.
        DataError: damaged annotations, or a set in which nothing is left to train on.
    """
    register_datasets(cfg)
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError("MODEL.LOAD_PROPOSALS is True, but proposals come as pickles, which are not read here")
    dicts: list[dict[str, Any]] = []
    for name in cfg.DATASETS.TRAIN:
        _check_name(name, "DATASETS.TRAIN")
        own = _filter(cfg, name, _load(name))
        _check_classes(cfg, name)
        _check_same_classes(name, cfg.DATASETS.TRAIN[0])
        _check_annotations(cfg, name, own)
        dicts += own
    return dicts


def check_test_sets(cfg: CfgNode) -> None:
    """Load DATASETS.TEST, and check that a model of this configuration can be evaluated on it.

    Raises:
        ConfigError: a name that is not registered, or classes that are not the model's, or not those of the training
            sets (where these are known without reading them).
        FileNotFoundError, DataError: as :func:`load_training_set`.
    """
    for name in cfg.DATASETS.TEST:
        load_test_set(cfg, name)
        _check_classes(cfg, name)
        for train in cfg.DATASETS.TRAIN:
            _check_same_classes(name, train)


def load_test_set(cfg: CfgNode, name: str) -> list[dict[str, Any]]:
    """All images of a registered set in Detectron2's format, without annotations. A file is read once in a process.

    Raises:
        ConfigError: the name is not registered.
        FileNotFoundError, DataError: as :func:`load_training_set`.
    """
    register_datasets(cfg)
    _check_name(name, "DATASETS.TEST")
    metadata = MetadataCatalog.get(name)
    version = None
    # What is made on use may be made elsewhere next time, and a set without a file may change unseen.
    if not metadata.get("made_on_use") and os.path.isfile(metadata.get("json_file", "")):
        version = name, metadata.json_file, os.path.getmtime(metadata.json_file)
    if version in _TEST_SETS:
        return _TEST_SETS[version]
    # Evaluators read the annotations from the file, and most of a set's memory is theirs.
    dicts = [{key: value for key, value in d.items() if key != "annotations"} for d in _load(name)]
    if version:
        _TEST_SETS[version] = dicts
    return dicts


def _check_name(name: str, key: str) -> None:
    if name not in DatasetCatalog:
        raise ConfigError(
            f"{key}: no data set {name} is registered{did_you_mean(name, DatasetCatalog.list())}; DATASETS.REGISTER "
            "registers one of your own"
        )


def _load(name: str) -> list[dict[str, Any]]:
    """All images of a set with all annotations; at least one of each."""
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if json_file and not metadata.get("made_on_use"):
        if not PathManager.isfile(json_file):
            raise _missing(name, json_file)
        if not PathManager.isdir(metadata.image_root):
            raise _missing(name, metadata.image_root)
    try:
        dicts = get_detection_dataset_dicts([name], filter_empty=False)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise _missing(name, error.filename or str(error)) from error
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if not json_file:  # a function of the user's own: its traceback says more
            raise
        raise DataError(
            f"data set {name}: {json_file} is not a complete file of COCO annotations ({type(error).__name__}: {error})"
        ) from error
    if json_file and not PathManager.isfile(dicts[0]["file_name"]):
        raise _missing(name, dicts[0]["file_name"])
    if "annotations" in dicts[0] and not any(d["annotations"] for d in dicts):
        raise DataError(f"data set {name} has {len(dicts)} images without a single annotation ({json_file})")
    return dicts


def _missing(name: str, path: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"data set {name}: {os.path.abspath(path)} is not there.\n"
        f"Data sets are looked for below the folder that the environment variable {ROOT_VARIABLE} names (now "
        f"{os.environ.get(ROOT_VARIABLE) or 'not set'}), or else in ./datasets; your own are where DATASETS.REGISTER."
        f"{name} says.\n"
        "To get COCO: train2017.zip, val2017.zip and annotations_trainval2017.zip from "
        "https://cocodataset.org/#download, unpacked in the folder coco there. Without any download: digits_coco_train "
        "and digits_coco_val."
    )


def _filter(cfg: CfgNode, name: str, dicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Detectron2's two filters of training images."""
    if "annotations" not in dicts[0]:
        return dicts
    kept = dicts
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        kept = filter_images_with_only_crowd_annotations(kept)
    if cfg.MODEL.KEYPOINT_ON:
        kept = filter_images_with_few_keypoints(kept, cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE)
    if not kept:
        raise DataError(
            f"data set {name}: of {len(dicts)} images none is left to train on: they have only crowds, or (with "
            "MODEL.KEYPOINT_ON) fewer key points than MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE"
        )
    return kept


def _check_classes(cfg: CfgNode, name: str) -> None:
    classes = MetadataCatalog.get(name).get("thing_classes")
    key, value = num_classes(cfg)
    if classes is not None and len(classes) != value:
        some = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
        raise ConfigError(
            f"{key} is {value}, but the annotations of {name} have {len(classes)} classes ({some}): set {key} to "
            f"{len(classes)}"
        )


def _check_same_classes(name: str, other: str) -> None:
    """Classes are numbered in the order of their ids, so the names must be the same in that order."""
    own, others = (MetadataCatalog.get(n).get("thing_classes") if n in MetadataCatalog else None for n in (name, other))
    if own is None or others is None or own == others:
        return
    number = next((i for i, pair in enumerate(zip(own, others, strict=False)) if pair[0] != pair[1]), None)
    detail = (
        f"class {number} is {own[number]} there and {others[number]} here"
        if number is not None
        else (f"{len(own)} classes there and {len(others)} here")
    )
    raise ConfigError(f"the data set {name} has other classes than {other}: {detail}")


def _check_annotations(cfg: CfgNode, name: str, dicts: list[dict[str, Any]]) -> None:
    """What Detectron2's mapper would stumble over at some step of the training."""
    for record in dicts:
        for annotation in record.get("annotations", ()):
            if annotation.get("iscrowd", 0):
                continue
            if len(annotation.get("bbox", ())) not in (4, 5):
                raise DataError(
                    f"data set {name}: an annotation of {record['file_name']} has the bbox {annotation.get('bbox')}"
                )
            if not cfg.MODEL.MASK_ON:
                continue
            if "segmentation" not in annotation:
                raise ConfigError(
                    f"MODEL.MASK_ON is True, but {name} has an annotation without a segmentation (of "
                    f"{record['file_name']}): set MODEL.MASK_ON to False"
                )
            if isinstance(annotation["segmentation"], dict) and cfg.INPUT.MASK_FORMAT != "bitmask":
                raise ConfigError(
                    f"INPUT.MASK_FORMAT is {cfg.INPUT.MASK_FORMAT}, but {name} has run-length encoded masks (of "
                    f"{record['file_name']}): set it to bitmask"
                )
