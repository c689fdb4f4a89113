"""Register the data sets of the configuration, load them, and check them against the model before training starts."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import filter_images_with_few_keypoints, filter_images_with_only_crowd_annotations
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from d2distill.common.data.locate import ROOT_VARIABLE, data_path
from d2distill.common.engine.class_order import check_class_order
from d2distill.common.errors import ConfigError, DataError, UserError, did_you_mean
from d2distill.detection.config import num_classes

from .annotations import check_content, checked_coco

__all__ = ["check_test_sets", "check_trained_classes", "load_test_set", "load_training_set", "register_datasets"]

logger = logging.getLogger("detectron2.d2distill")


def register_datasets(cfg: CfgNode) -> None:
    """Register every entry ``{name: {JSON: annotations, IMAGES: folder}}`` of DATASETS.REGISTER as a COCO data set.

    Relative paths are below DETECTRON2_DATASETS, or ./datasets where that is not set. An entry that is registered
    already is skipped.

    Raises:
        ConfigError: an entry with other keys, or a name that belongs to another data set.
    """
    for name, entry in cfg.DATASETS.REGISTER.items():
        key = f"DATASETS.REGISTER.{name}"
        if not isinstance(entry, dict) or {k: type(v) for k, v in entry.items()} != {"JSON": str, "IMAGES": str}:
            raise ConfigError(f"{key} must be {{JSON: annotation file, IMAGES: folder of images}}, but is {entry!r}")
        paths = {"json_file": str(data_path(entry.JSON)), "image_root": str(data_path(entry.IMAGES))}
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, **paths)
            continue
        known = {path: MetadataCatalog.get(name).get(path) for path in paths}
        if known != paths:
            raise ConfigError(
                f"{key}: the name is taken by a data set with annotations {known['json_file']} and images "
                f"{known['image_root']}; choose another name"
            )


def load_training_set(cfg: CfgNode) -> list[dict[str, Any]]:
    """Load DATASETS.TRAIN in Detectron2's format, without the images that Detectron2 filters out for training.

    Where the student's or the teacher's NUM_CLASSES is 0, it becomes that of the data.

    Raises:
        ConfigError: a name that is not registered, precomputed proposals, another number of classes than the model's,
            data sets with different classes, or masks that the model cannot be trained with.
        FileNotFoundError: annotations or images are missing; the message says where they are searched.
        DataError: damaged annotations (see :mod:`.annotations`), or no image left after filtering.
    """
    register_datasets(cfg)
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError("MODEL.LOAD_PROPOSALS must be False: files of proposals are pickles, which may run code")
    dicts: list[dict[str, Any]] = []
    for name in cfg.DATASETS.TRAIN:
        loaded = _without_useless_images(cfg, name, _load(cfg, name, "DATASETS.TRAIN"))
        _check_classes(cfg, name, cfg.DATASETS.TRAIN[:1])
        _check_annotations(cfg, name, loaded)
        _log_classes(name, "DATASETS.TRAIN", loaded)
        dicts += loaded
    return dicts


def check_test_sets(cfg: CfgNode) -> dict[str, list[dict[str, Any]]]:
    """Load DATASETS.TEST, and check that the model can be evaluated on it; errors as :func:`load_training_set`.

    The metadata of a data set then say whether it is ``annotated``: that of a challenge may have images alone.

    Returns:
        What :func:`load_test_set` gives for each of them.
    """
    register_datasets(cfg)
    images = {}
    for name in cfg.DATASETS.TEST:
        loaded = _load(cfg, name, "DATASETS.TEST")
        _check_classes(cfg, name, cfg.DATASETS.TRAIN)
        _log_classes(name, "DATASETS.TEST", loaded)
        MetadataCatalog.get(name).annotated = any(_objects(record) for record in loaded)
        images[name] = _without_annotations(loaded)
    return images


def load_test_set(cfg: CfgNode, name: str) -> list[dict[str, Any]]:
    """Load all images of a data set in Detectron2's format, without annotations, which would take most of the memory.

    Evaluators read them from the file.
    """
    register_datasets(cfg)
    return _without_annotations(_load(cfg, name, "DATASETS.TEST"))


def _without_annotations(dicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "annotations"} for record in dicts]


def _load(cfg: CfgNode, name: str, key: str) -> list[dict[str, Any]]:
    if name not in DatasetCatalog:
        raise ConfigError(
            f"{key}: no data set {name} is registered{did_you_mean(name, DatasetCatalog.list())}; register your own "
            "under DATASETS.REGISTER"
        )
    json_file = MetadataCatalog.get(name).get("json_file")
    heads = {"masks": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    check = partial(check_content, name=name, key=key, file=json_file, training=key == "DATASETS.TRAIN", **heads)
    try:
        with checked_coco(check) if json_file else nullcontext():
            dicts = get_detection_dataset_dicts([name], filter_empty=False)
    except FileNotFoundError as error:
        raise _missing(name, error.filename or str(error)) from error
    except Exception as error:  # damaged annotations raise nearly anything
        # A function that a user registered is code, which needs its traceback.
        if isinstance(error, UserError) or not json_file:
            raise
        raise DataError(f"data set {name}: cannot use {json_file} ({type(error).__name__}: {error})") from error
    if json_file and not PathManager.isfile(dicts[0]["file_name"]):
        raise _missing(name, dicts[0]["file_name"])
    return dicts


def _without_useless_images(cfg: CfgNode, name: str, dicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what Detectron2 filters out for training; the log says how much that is."""
    if "annotations" not in dicts[0]:
        return dicts
    kept, keypoints = dicts, cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        kept = filter_images_with_only_crowd_annotations(kept)
    if keypoints:
        kept = filter_images_with_few_keypoints(kept, keypoints)
    reason = "no object" + (f", or fewer than {keypoints} key points" if keypoints else "")
    if not kept:
        raise DataError(f"data set {name}: there is nothing to train on: its {len(dicts)} images have {reason}")
    crowds = sum(len(record["annotations"]) - len(_objects(record)) for record in kept)
    logger.info(
        f"DATASETS.TRAIN: of {name} are left out {len(dicts) - len(kept)} of {len(dicts)} images ({reason}) and "
        f"{crowds} crowds among the annotations of the others"
    )
    return kept


def _missing(name: str, path: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"data set {name}: {os.path.abspath(path)} does not exist. "
        f"Data sets are searched in the folder named by the environment variable {ROOT_VARIABLE} (now "
        f"{os.environ.get(ROOT_VARIABLE) or 'not set'}), or else in ./datasets; your own where DATASETS.REGISTER."
        f"{name} says. "
        "To get COCO: unpack train2017.zip, val2017.zip and annotations_trainval2017.zip from "
        "https://cocodataset.org/#download in its subfolder coco. digits_coco_train and digits_coco_val need no "
        "download."
    )


def _check_classes(cfg: CfgNode, name: str, others: tuple[str, ...]) -> None:
    """Check that a data set has the classes of `others`, and as many as the model; NUM_CLASSES 0 becomes theirs."""
    classes = MetadataCatalog.get(name).get("thing_classes")
    for prefix, node in (("", cfg), ("TEACHER.", cfg.TEACHER)):
        key, value = num_classes(node)
        if value == 0 and classes is None:
            raise ConfigError(f"{prefix}{key} is 0, to be taken from the data, but {name} does not name its classes")
        if value == 0:
            cfg.merge_from_list([f"{prefix}{key}", len(classes)])
    if classes is None:
        return
    for other in others:
        theirs = MetadataCatalog.get(other).get("thing_classes") if other in MetadataCatalog else None
        if theirs is not None and theirs != classes:
            there, here = next(pair for pair in zip_longest(theirs, classes) if pair[0] != pair[1])
            first = f"{there} there is {here} here"
            if len(theirs) != len(classes):
                first = f"{_listed(theirs)} there, {_listed(classes)} here"
            raise ConfigError(
                f"the data set {name} has other classes than {other}: {first}. 'categories' must list the same classes "
                "in both, also those without objects, with ids in the same order"
            )
    key, value = num_classes(cfg)
    if len(classes) != value:
        way_out = f"set {key} to {len(classes)}"
        if name not in cfg.DATASETS.TRAIN:
            way_out = (
                "'categories' of a test set must list every class of the model, also those without objects; where the "
                f"model has no more, {way_out}"
            )
        raise ConfigError(f"{key} is {value}, but the annotations of {name} have {_listed(classes)}: {way_out}")


def check_trained_classes(where: str, trained: Sequence[str], names: Sequence[str], may_differ: bool = False) -> None:
    """:func:`.check_class_order` for the classes of weights and those of data sets, which may not be known."""
    for name in names:
        classes = MetadataCatalog.get(name).get("thing_classes", ()) if name in MetadataCatalog else ()
        way_out = "The data must list the same under 'categories', also those without objects, with ids in this order"
        check_class_order(where, trained, f"the data set {name}", classes, way_out, may_differ)


def _listed(classes: Sequence[str]) -> str:
    return f"{len(classes)} class{'es' * (len(classes) != 1)} ({', '.join(classes[:3])}{', ...' * (len(classes) > 3)})"


def _objects(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The annotations of an image that count: crowds are passed over."""
    return [annotation for annotation in record.get("annotations", ()) if not annotation.get("iscrowd", 0)]


def _log_classes(name: str, key: str, dicts: list[dict[str, Any]]) -> None:
    """Log what Detectron2's table of annotations does not have: all names in their order, and the numbers of images."""
    classes = MetadataCatalog.get(name).get("thing_classes")
    if classes is None:
        return
    objects, images = Counter(), Counter()
    for record in dicts:
        found = [annotation["category_id"] for annotation in _objects(record)]
        objects.update(found)
        images.update(set(found))
    if not objects:
        logger.info(f"{key}: {name} has {len(dicts)} images and no annotations; classes in order: {', '.join(classes)}")
        return
    facts = ", ".join(f"{label}: {objects[i]} in {images[i]}" for i, label in enumerate(classes))
    empty = sum(not _objects(record) for record in dicts)
    logger.info(
        f"{key}: {name} has {len(dicts)} images, {empty} of them without objects; classes in order, with their numbers "
        f"of objects and images: {facts}"
    )


def _check_annotations(cfg: CfgNode, name: str, dicts: list[dict[str, Any]]) -> None:
    """Check for annotations that would stop Detectron2's mapper or mask head in the middle of a training."""
    for record in dicts:
        for annotation in record.get("annotations", ()):
            if annotation.get("iscrowd", 0):
                continue
            where = f"{name} has an annotation (of {record['file_name']})"
            if len(annotation.get("bbox", ())) not in (4, 5):
                raise DataError(f"{where} with the bbox {annotation.get('bbox')}")
            if cfg.MODEL.MASK_ON and "segmentation" not in annotation:
                raise ConfigError(f"MODEL.MASK_ON is True, but {where} without a segmentation: set it to False")
            is_rle = cfg.MODEL.MASK_ON and isinstance(annotation["segmentation"], dict)
            if is_rle and cfg.INPUT.MASK_FORMAT != "bitmask":
                raise ConfigError(f"{where} with a run-length encoded mask: set INPUT.MASK_FORMAT to bitmask")
