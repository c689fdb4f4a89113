"""How each network's images are made: settings, else what belongs to its weights, else what the data set says."""

import logging
from collections.abc import Sequence
from typing import Any

from d2distill.classification.config import teacher_nodes
from d2distill.classification.data import dataset_info
from d2distill.classification.models.published import InputSpec, published_input
from d2distill.common.config import CfgNode, chosen_methods
from d2distill.common.distillers import Distiller
from d2distill.common.engine.class_order import check_class_order, classes_in
from d2distill.common.engine.weight_files import LIBRARIES, preprocess_in, read_description

__all__ = ["resolve_inputs"]

logger = logging.getLogger("detectron2.d2distill")


def resolve_inputs(cfg: CfgNode, classes: Sequence[str] = (), training: bool = True) -> CfgNode:
    """A copy of `cfg` in which nothing of the images' preparation is left open.

    The classes that a file of weights names are held against those of the data, as far as either is known.

    PIXEL_MEAN and PIXEL_STD of each network are, in this order, what is set, what a student of ours has in its file,
    what the library says of the weights or the network, and the data set's. INPUT.SIZE, RESIZE and INTERPOLATION are
    the student's in the same order, SIZE only where the data set has images of any size. The log names what is not the
    data set's.

    Args:
        classes: of the data, in the order of the labels.
        training: the student's weights are those that it begins with, and its teachers' logits may be compared with
            its own; else they are evaluated.

    Raises:
        CheckpointError: the classes of weights are others than the data's (see :func:`.check_class_order`).
    """
    cfg = cfg.clone()
    cfg.defrost()
    info, inputs, student = dataset_info(cfg.DATASETS.NAME), cfg.INPUT, cfg.MODEL.STUDENT
    description = _description(student.WEIGHTS)
    _check_classes("MODEL.STUDENT", student.WEIGHTS, description, classes, may_differ=training)
    own, source = _input_spec(student.NAME, student.WEIGHTS, description)
    is_open = not (inputs.SIZE and inputs.RESIZE and inputs.INTERPOLATION)
    if inputs.SIZE == 0:
        any_size = own is not None and info.model_family == "imagenet"
        inputs.SIZE = own.size if any_size else info.image_size
    if inputs.RESIZE == 0:
        size, resize = (own.size, own.resize) if own is not None else (224, 256)
        inputs.RESIZE = round(inputs.SIZE * resize / size)
    if not inputs.INTERPOLATION:
        inputs.INTERPOLATION = own.interpolation if own is not None else "bilinear"
    if own is not None and is_open:
        logger.info(
            f"MODEL.STUDENT: test images are resized to {inputs.RESIZE} pixels ({inputs.INTERPOLATION}) and cropped to "
            f"{inputs.SIZE}, after {source}"
        )
    _set_statistics("MODEL.STUDENT", student, own, source, info)
    teachers, kinds = teacher_nodes(cfg), chosen_methods(cfg).values()
    on_logits = training and any("logits" in kind.needs or kind.deployed is not Distiller.deployed for kind in kinds)
    for number, node in enumerate(teachers):
        key = "MODEL.TEACHER" if len(teachers) == 1 else f"MODEL.TEACHER {number}"
        description = _description(node.WEIGHTS)
        if on_logits and len(classes_in(description)) == len(classes):
            _check_classes(key, node.WEIGHTS, description, classes)
        _set_statistics(key, node, *_input_spec(node.NAME, node.WEIGHTS, description), info)
    for name in ("PIXEL_MEAN", "PIXEL_STD") if teachers else ():
        values = [node[name] for node in teachers]
        cfg.MODEL.TEACHER[name] = values[0] if len(values) == 1 else values
    return cfg


def _set_statistics(key: str, node: CfgNode, own: InputSpec | None, source: str, info: Any) -> None:
    for name, of_network, of_data in (("PIXEL_MEAN", "mean", "pixel_mean"), ("PIXEL_STD", "std", "pixel_std")):
        default = list(getattr(info, of_data))
        if not node[name]:
            node[name] = default if own is None else list(getattr(own, of_network))
            if node[name] != default:
                shown = [round(value, 3) for value in node[name]]
                logger.info(f"{key}.{name} is {shown}, after {source}, and not {info.name}'s")


def _description(weights: str) -> dict[str, Any]:
    return read_description(weights) if weights and weights.partition(":")[0] not in LIBRARIES else {}


def _check_classes(
    key: str, weights: str, description: dict[str, Any], classes: Sequence[str], may_differ: bool = False
) -> None:
    way_out = "DATASETS.CLASSES names the classes of the data in their order, e.g. the student.json of the weights' run"
    trained = classes_in(description)
    check_class_order(f"{key}.WEIGHTS: {weights}", trained, "the data set", classes, way_out, may_differ)


def _input_spec(name: str, weights: str, description: dict[str, Any]) -> tuple[InputSpec | None, str]:
    """What a network with such weights expects, and who says so."""
    found = preprocess_in(description, "mean", "std", "size", "resize", "interpolation")
    if found is not None:
        mean, std, *rest = found
        return InputSpec(tuple(mean), tuple(std), *rest), f"the run that made {weights}"
    for source in (weights, name):
        if (found := published_input(source)) is not None:
            return found, source
    return None, ""
