"""Settings of the classification trainer: all defaults, reading, and every check that needs no data."""

from typing import Any

import torch

from d2distill.classification.data import dataset_info
from d2distill.classification.solver import OPTIMIZERS, SCHEDULES
from d2distill.common.config import CfgNode, add_distill_defaults, chosen_methods, read_cfg, resolve_device
from d2distill.common.errors import ConfigError, did_you_mean
from d2distill.common.rules import (
    MOMENTUM,
    NUMBERS,
    RISING,
    TEXT_OR_TEXTS,
    at_least,
    check_rules,
    is_number,
    refuse_nan,
)

__all__ = [
    "PRECISIONS",
    "get_cfg",
    "image_size",
    "load_cfg",
    "teacher_nodes",
    "validate",
]

#: Precisions of autocast by SOLVER.AMP.
PRECISIONS = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}
#: What single settings must be, whatever the others are. The methods check their own.
_RULES = {
    "SEED": at_least(0),
    "LOG_PERIOD": at_least(1),
    "MODEL.NUM_CLASSES": at_least(0),
    "MODEL.TEACHER.NAME": TEXT_OR_TEXTS,
    "MODEL.TEACHER.WEIGHTS": TEXT_OR_TEXTS,
    "MODEL.TEACHER.SHARES": NUMBERS,
    "DISTILL.CE_WEIGHT": at_least(0),
    "DATASETS.TRAIN_SIZE": at_least(0),
    "INPUT.SIZE": at_least(0),
    "INPUT.MIXUP": at_least(0),
    "INPUT.CUTMIX": at_least(0),
    "SOLVER.EPOCHS": at_least(1, most=10**9),
    "SOLVER.IMS_PER_BATCH": at_least(1),
    "SOLVER.BASE_LR": at_least(0),
    "SOLVER.MOMENTUM": MOMENTUM,
    "SOLVER.WEIGHT_DECAY": at_least(0),
    "SOLVER.STEPS": RISING,
    "SOLVER.GAMMA": at_least(0),
    "SOLVER.WARMUP_EPOCHS": at_least(0),
    "SOLVER.CLIP_GRAD_NORM": at_least(0),
    "SOLVER.LABEL_SMOOTHING": MOMENTUM,
    "SOLVER.ACCUMULATE": at_least(1),
    "SOLVER.EMA_DECAY": MOMENTUM,
    "SOLVER.CHECKPOINT_PERIOD": at_least(1),
    "SOLVER.CHECKPOINT_STEPS": at_least(0),
    "SOLVER.CHECKPOINT_KEEP": at_least(1),
    "DATALOADER.NUM_WORKERS": at_least(0),
    "TEST.EVAL_PERIOD": at_least(1),
    "TEST.IMS_PER_BATCH": at_least(1, most=10**9),
}


class _CfgNode(CfgNode):
    #: Keys that take one value, or a list of one per teacher.
    LISTABLE = ("MODEL.TEACHER.NAME", "MODEL.TEACHER.WEIGHTS")


def get_cfg() -> CfgNode:
    """All settings with their defaults, DISTILL included."""
    cfg = _CfgNode()
    # The run folder: config, logs, checkpoints. Empty: output/<name of the config file>.
    cfg.OUTPUT_DIR = ""
    # Everything random in a run is a function of it: weights, order, augmentation, dropout.
    cfg.SEED = 0
    # Modules or files (relative to the config file) to import first: own methods, models, data sets.
    cfg.IMPORTS = []
    # Let cuDNN try its algorithms; faster, but two runs may then differ in the last bits.
    cfg.CUDNN_BENCHMARK = False
    # Log every so many steps, and at each epoch's end.
    cfg.LOG_PERIOD = 20

    cfg.MODEL = _CfgNode()
    # 0: what the data set says.
    cfg.MODEL.NUM_CLASSES = 0
    # auto: the GPU if there is one.
    cfg.MODEL.DEVICE = "auto"
    for side in ("STUDENT", "TEACHER"):
        node = cfg.MODEL[side] = _CfgNode()
        # A model of the zoo, timm:NAME or torchvision:NAME. The teacher's may be a list: several teachers.
        node.NAME = ""
        # Path, URL, torchvision:WEIGHTS_ENUM or timm:NAME. Empty: random weights.
        node.WEIGHTS = ""
        # RGB, in 0..255. Empty: the data set's.
        node.PIXEL_MEAN = []
        node.PIXEL_STD = []
    # Of several teachers: how much each counts. Empty: all the same. PIXEL_MEAN and _STD then are for all, or a list.
    cfg.MODEL.TEACHER.SHARES = []
    # Batch norms of the student take their statistics over all processes.
    cfg.MODEL.SYNC_BN = False

    add_distill_defaults(cfg)

    cfg.DATASETS = _CfgNode()
    cfg.DATASETS.NAME = "cifar100"
    # Empty: the environment variable DETECTRON2_DATASETS, else ./datasets.
    cfg.DATASETS.ROOT = ""
    # Train on the first so many samples of a fixed shuffle. 0: all.
    cfg.DATASETS.TRAIN_SIZE = 0

    cfg.INPUT = _CfgNode()
    # Side of the square images the networks see. 0: the data set's.
    cfg.INPUT.SIZE = 0
    # A recipe of classification/data/augment.py. Empty: the data set's.
    cfg.INPUT.AUGMENTATION = ""
    # Mixup (ICLR 2018) and cutmix (ICCV 2019): alpha of the Beta distribution; 0: off. Both: one of them in each step.
    cfg.INPUT.MIXUP = 0.0
    cfg.INPUT.CUTMIX = 0.0

    cfg.SOLVER = _CfgNode()
    cfg.SOLVER.EPOCHS = 240
    # Of all processes together.
    cfg.SOLVER.IMS_PER_BATCH = 64
    # SGD, AdamW, or DOT, which gives the task's and the distillation's gradient a momentum each: 0.9 -+ DELTA.
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.SOLVER.DELTA = 0.075
    cfg.SOLVER.BASE_LR = 0.05
    cfg.SOLVER.MOMENTUM = 0.9
    # SGD's alone.
    cfg.SOLVER.NESTEROV = False
    cfg.SOLVER.WEIGHT_DECAY = 5e-4
    # step: times GAMMA after each of STEPS (in epochs). cosine: to 0 at the end.
    cfg.SOLVER.LR_SCHEDULE = "step"
    cfg.SOLVER.STEPS = [150, 180, 210]
    cfg.SOLVER.GAMMA = 0.1
    # Linear, from a thousandth of BASE_LR, in epochs.
    cfg.SOLVER.WARMUP_EPOCHS = 0
    # Share of the target's probability that goes to all classes alike.
    cfg.SOLVER.LABEL_SMOOTHING = 0.0
    # Run each batch in so many parts, to save memory: batch size, schedule and data order stay as they are.
    cfg.SOLVER.ACCUMULATE = 1
    # Decay of an exponential moving average of the student, evaluated and saved beside the live one. 0: none.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Largest norm of the gradient. 0: no clipping.
    cfg.SOLVER.CLIP_GRAD_NORM = 0.0
    # Automatic mixed precision: "", "bf16" or "fp16" (with loss scaling). Losses are computed in fp32 all the same.
    cfg.SOLVER.AMP = ""
    # Save every so many epochs, and, if not 0, every so many steps as well. The newest KEEP files stay.
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    cfg.SOLVER.CHECKPOINT_STEPS = 0
    cfg.SOLVER.CHECKPOINT_KEEP = 2

    cfg.DATALOADER = _CfgNode()
    # Per process. The result does not depend on it.
    cfg.DATALOADER.NUM_WORKERS = 4

    cfg.TEST = _CfgNode()
    # In epochs.
    cfg.TEST.EVAL_PERIOD = 1
    cfg.TEST.IMS_PER_BATCH = 256
    return cfg


def load_cfg(config_file: str = "", opts: list[str] | None = None) -> CfgNode:
    """Defaults, then a YAML file with its ``_BASE_`` files, then ``KEY VALUE`` pairs; checked.

    Raises:
        ConfigError: unknown keys (named with the nearest known ones) or impossible values.
        FileNotFoundError: no such file.
    """
    cfg = read_cfg(get_cfg, config_file, opts)
    validate(cfg)
    return cfg


def image_size(cfg: CfgNode) -> int:
    """Side in pixels of the images the networks see."""
    return cfg.INPUT.SIZE or dataset_info(cfg.DATASETS.NAME).image_size


def teacher_nodes(cfg: CfgNode, given: int = 0) -> list[CfgNode]:
    """One node of NAME, WEIGHTS, PIXEL_MEAN, PIXEL_STD and SHARE per teacher; shares sum to 1.

    Args:
        given: number of networks that take the place of those named, if any.

    Raises:
        ConfigError: lists of different length, or shares that are not positive.
    """
    node, count = cfg.MODEL.TEACHER, given or len(_names(cfg))
    if not count:
        return []
    names = [""] * count if given else _names(cfg)
    if given or not node.WEIGHTS:
        weights = [""] * count
    else:
        weights = [node.WEIGHTS] if isinstance(node.WEIGHTS, str) else list(node.WEIGHTS)
    shares = list(node.SHARES) or [1.0] * count
    statistics = []
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        several = any(isinstance(value, list | tuple) for value in node[key])
        statistics.append(list(node[key]) if several else [node[key]] * count)
    for key, values in zip(
        ("WEIGHTS", "SHARES", "PIXEL_MEAN", "PIXEL_STD"), (weights, shares, *statistics), strict=True
    ):
        if len(values) != count:
            raise ConfigError(f"MODEL.TEACHER.{key} has {len(values)} entries for {count} teachers: {values}")
    if any(share <= 0 for share in shares):
        raise ConfigError(f"MODEL.TEACHER.SHARES must be positive, but is {shares}")
    keys = ("NAME", "WEIGHTS", "PIXEL_MEAN", "PIXEL_STD")
    return [
        CfgNode({**dict(zip(keys, values[:4], strict=True)), "SHARE": values[4] / sum(shares)})
        for values in zip(names, weights, *statistics, shares, strict=True)
    ]


def _names(cfg: CfgNode) -> list[str]:
    names = cfg.MODEL.TEACHER.NAME
    return [name for name in ([names] if isinstance(names, str) else names) if name]


def _is_colour(values: Any) -> bool:
    return isinstance(values, list | tuple) and len(values) in (0, 3) and all(map(is_number, values))


def validate(cfg: CfgNode) -> None:
    """Check what can be checked before data and weights are touched.

    Raises:
        ConfigError: with the key, its value, and what would be right.
    """
    methods = chosen_methods(cfg)
    check_rules(cfg, _RULES)
    refuse_nan(cfg)
    if not cfg.MODEL.STUDENT.NAME:
        raise ConfigError("MODEL.STUDENT.NAME is empty: name the model to train, e.g. resnet8x4 or timm:resnet18")
    needy = [name for name, method in methods.items() if method.needs_teacher]
    if needy and not _names(cfg):
        raise ConfigError(f"DISTILL.METHODS {needy} need a teacher, but MODEL.TEACHER.NAME is empty")
    try:
        dataset_info(cfg.DATASETS.NAME)
    except ValueError as error:
        raise ConfigError(f"DATASETS.NAME: {error}") from None
    for key, known in (("OPTIMIZER", OPTIMIZERS), ("LR_SCHEDULE", SCHEDULES)):
        if cfg.SOLVER[key] not in known:
            value = cfg.SOLVER[key]
            raise ConfigError(f"SOLVER.{key} {value} is none of {', '.join(known)}{did_you_mean(value, known)}")
    for key, node in [("STUDENT", cfg.MODEL.STUDENT), *(("TEACHER", node) for node in teacher_nodes(cfg))]:
        for name in ("PIXEL_MEAN", "PIXEL_STD"):
            if not _is_colour(node[name]):
                raise ConfigError(
                    f"MODEL.{key}.{name} takes 3 numbers in RGB order, or none for the data set's, but is {node[name]}"
                )
        if any(value <= 0 for value in node.PIXEL_STD):
            raise ConfigError(f"MODEL.{key}.PIXEL_STD must be positive, but is {list(node.PIXEL_STD)}")
    if cfg.SOLVER.AMP not in PRECISIONS:
        raise ConfigError(f"SOLVER.AMP {cfg.SOLVER.AMP} is none of {', '.join(map(repr, PRECISIONS))}")
    if cfg.SOLVER.NESTEROV and cfg.SOLVER.OPTIMIZER != "SGD":
        raise ConfigError(f"SOLVER.NESTEROV is SGD's; {cfg.SOLVER.OPTIMIZER} has no such momentum")
    if cfg.SOLVER.NESTEROV and not cfg.SOLVER.MOMENTUM:
        raise ConfigError("SOLVER.NESTEROV needs a momentum, but SOLVER.MOMENTUM is 0")
    if cfg.SOLVER.OPTIMIZER == "DOT":
        if not 0 <= cfg.SOLVER.DELTA < min(cfg.SOLVER.MOMENTUM, 1 - cfg.SOLVER.MOMENTUM):
            raise ConfigError(f"SOLVER.DELTA {cfg.SOLVER.DELTA} must be below MOMENTUM and 1 - MOMENTUM")
        if (
            not cfg.DISTILL.METHODS
            or cfg.SOLVER.CLIP_GRAD_NORM
            or cfg.SOLVER.AMP == "fp16"
            or cfg.SOLVER.ACCUMULATE > 1
        ):
            raise ConfigError(
                "SOLVER.OPTIMIZER DOT needs a method, no CLIP_GRAD_NORM, no ACCUMULATE, and bf16 or no AMP"
            )
    resolve_device(cfg)
