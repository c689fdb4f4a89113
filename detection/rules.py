"""What the values of detectors' settings must be."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_PIL_to_numpy
from PIL import Image

from d2distill.common.errors import ConfigError, MissingDependencyError
from d2distill.common.rules import BELOW_ONE, INCREASING, LIST_OF_STR, LOGGERS, NUMBERS, Rule, at_least

__all__ = ["RULES", "check_network_input"]


def _numbers(limit: str, predicate: Callable[[float], bool]) -> Rule:
    def fits(values: Any) -> bool:
        return NUMBERS.predicate(values) and len(values) > 0 and predicate(min(values))

    return Rule(f"a list of at least one number{limit}", fits)


_EXPECTED_RESULTS = Rule(
    "a list of [task, metric, value, tolerance], e.g. [[bbox, AP, 38.5, 0.2]]",
    lambda value: all(
        isinstance(entry, list | tuple)
        and len(entry) == 4
        and LIST_OF_STR.predicate(entry[:2])
        and NUMBERS.predicate(entry[2:])
        for entry in value
    ),
)
#: What single settings must be, whatever the others are. The methods check their own.
RULES = {
    at_least(0): (
        "SEED", "SOLVER.BASE_LR", "SOLVER.WEIGHT_DECAY", "SOLVER.GAMMA", "SOLVER.WARMUP_ITERS",
        "SOLVER.WARMUP_FACTOR", "SOLVER.BIAS_LR_FACTOR", "SOLVER.WEIGHT_DECAY_NORM", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
        "SOLVER.REFERENCE_WORLD_SIZE", "DATALOADER.NUM_WORKERS", "TEST.EVAL_PERIOD",
        "MODEL.RPN.PRE_NMS_TOPK_TEST", "MODEL.RETINANET.TOPK_CANDIDATES_TEST",
    ),
    at_least(1): (
        "LOG_PERIOD", "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.CHECKPOINT_KEEP",
        "SOLVER.ACCUMULATE", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
        "TEST.DETECTIONS_PER_IMAGE", "TEST.AUG.MAX_SIZE",
    ),
    LIST_OF_STR: ("DATASETS.TRAIN", "DATASETS.TEST"),
    _numbers("", math.isfinite): ("MODEL.PIXEL_MEAN", "TEACHER.MODEL.PIXEL_MEAN"),
    _numbers(", all above 0", lambda low: low > 0): ("MODEL.PIXEL_STD", "TEACHER.MODEL.PIXEL_STD"),
    _numbers(", none below 0", lambda low: low >= 0): ("INPUT.MIN_SIZE_TRAIN", "TEST.AUG.MIN_SIZES"),
    Rule("at least 0, or None", lambda value: value is None or (type(value) in (int, float) and value >= 0)): (
        "SOLVER.WEIGHT_DECAY_BIAS",
    ),
    Rule("polygon or bitmask", {"polygon", "bitmask"}.__contains__): ("INPUT.MASK_FORMAT",),
    Rule("above 0 and at most 1", lambda value: 0 < value <= 1): ("DATALOADER.RANDOM_SUBSET_RATIO",),
    _EXPECTED_RESULTS: ("TEST.EXPECTED_RESULTS",),
    BELOW_ONE: ("SOLVER.MOMENTUM", "SOLVER.EMA_DECAY"),
    INCREASING: ("SOLVER.STEPS",),
    LOGGERS: ("LOGGERS",),
}  # fmt: skip


def check_network_input(prefix: str, cfg: CfgNode) -> None:
    """Check the settings of the images that a network is given, and that its layers can be had here."""
    model, image_format = cfg.MODEL, cfg.INPUT.FORMAT
    try:
        # Empty would leave each image as its file is, grey or not.
        _, _, channels = convert_PIL_to_numpy(Image.new("RGB", (1, 1)), image_format or "none").shape
    except ValueError:  # also where there is no third dimension
        raise ConfigError(f"{prefix}INPUT.FORMAT is {image_format}, but must be BGR, RGB or L") from None
    sizes = {len(model.PIXEL_MEAN), len(model.PIXEL_STD)}
    # Grey images are given to every channel of a network that has several.
    if sizes != {channels} and (channels > 1 or len(sizes) > 1):
        raise ConfigError(
            f"{prefix}MODEL.PIXEL_MEAN {model.PIXEL_MEAN} and PIXEL_STD {model.PIXEL_STD} must have a number for each "
            f"channel of {prefix}INPUT.FORMAT {image_format}, {channels}"
        )
    if max(model.PIXEL_STD) < 1:
        raise ConfigError(
            f"{prefix}MODEL.PIXEL_STD {model.PIXEL_STD} is of images in 0..1, but here they are in 0..255: multiply "
            "mean and deviation by 255"
        )
    if any(model.RESNETS.DEFORM_ON_PER_STAGE) and find_spec("detectron2._C") is None:
        raise MissingDependencyError(
            f"{prefix}MODEL.RESNETS.DEFORM_ON_PER_STAGE: deformable convolutions need Detectron2's compiled extension, "
            "which this installation lacks: build Detectron2 with it, or set [False, False, False, False]"
        )
