"""Settings of the classification trainer: reading them, and every check that needs no data.

torch and the data sets are imported when they are needed: a wrong key is answered before that.
"""

import os

from d2distill.classification.defaults import get_cfg, own_cfg
from d2distill.common.config import CfgNode, add_distill_defaults, chosen_methods, read_cfg, resolve_device
from d2distill.common.config_node import absolute_file
from d2distill.common.errors import ConfigError, did_you_mean
from d2distill.common.rules import BELOW_ONE, INCREASING, LOGGERS, NUMBERS, STR_OR_LIST, Rule, at_least, check_rules

__all__ = ["check_keys", "get_cfg", "image_size", "load_cfg", "schedule_notes", "teacher_nodes", "validate"]

#: What single settings must be, whatever the others are. The methods check their own.
_RULES = {
    at_least(0): (
        "SEED", "MODEL.NUM_CLASSES", "DISTILL.CE_WEIGHT", "DATASETS.TRAIN_SIZE", "INPUT.SIZE", "INPUT.RESIZE",
        "INPUT.MIXUP", "INPUT.CUTMIX", "SOLVER.BASE_LR", "SOLVER.WEIGHT_DECAY", "SOLVER.GAMMA", "SOLVER.WARMUP_EPOCHS",
        "SOLVER.CLIP_GRAD_NORM", "SOLVER.CHECKPOINT_STEPS", "DATALOADER.NUM_WORKERS", "DATASETS.SPLIT_SEED",
        "INPUT.REPLAY_EPOCHS", "MODEL.TEACHER.CACHE_GB", "MODEL.TEACHER.CACHE_TOP_K", "DATALOADER.RESIDENT_GB",
    ),
    at_least(1): (
        "LOG_PERIOD", "SOLVER.EPOCHS", "SOLVER.IMS_PER_BATCH", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.CHECKPOINT_KEEP",
        "SOLVER.ACCUMULATE", "TEST.EVAL_PERIOD", "TEST.IMS_PER_BATCH",
    ),
    STR_OR_LIST: ("MODEL.TEACHER.NAME", "MODEL.TEACHER.WEIGHTS"),
    Rule(
        "a file, or a list of names (numbers in quotes)", STR_OR_LIST.predicate
    ): ("DATASETS.CLASSES",),
    Rule(
        '"balanced", or a list of numbers of at least 0, one per class in their order',
        lambda value: value in ("", "balanced") or (NUMBERS.predicate(value) and min(value, default=0) >= 0),
    ): ("SOLVER.CLASS_WEIGHTS",),
    Rule(
        "two increasing numbers, e.g. [0, 4095]",
        lambda value: NUMBERS.predicate(value) and len(value) == 2 and value[0] < value[1],
    ): ("INPUT.RANGE_16BIT",),
    Rule("shuffle or balanced", ("shuffle", "balanced").__contains__): ("DATALOADER.SAMPLER",),
    Rule("raise or skip", ("raise", "skip").__contains__): ("DATALOADER.ON_ERROR",),
    Rule("fp32 or fp16", ("fp32", "fp16").__contains__): ("MODEL.TEACHER.CACHE_DTYPE",),
    Rule('auto, teacher, all, or "" for none', ("auto", "", "teacher", "all").__contains__): ("SOLVER.COMPILE",),
    Rule(
        "auto, contiguous or channels_last", ("auto", "contiguous", "channels_last").__contains__
    ): ("SOLVER.MEMORY_FORMAT",),
    NUMBERS: ("MODEL.TEACHER.SHARES",),
    BELOW_ONE: ("SOLVER.MOMENTUM", "SOLVER.LABEL_SMOOTHING", "SOLVER.EMA_DECAY", "DATASETS.VAL_FRACTION"),
    INCREASING: ("SOLVER.STEPS",),
    LOGGERS: ("LOGGERS",),
}  # fmt: skip


def check_keys(config_file: str = "", opts: list[str] | None = None) -> None:
    """Raise what :func:`load_cfg` does for wrong keys, types and methods, and import no more than that needs."""
    chosen_methods(read_cfg(own_cfg, add_distill_defaults, config_file, opts))


def load_cfg(config_file: str = "", opts: list[str] | None = None) -> CfgNode:
    """Defaults, YAML file and ``KEY VALUE`` pairs (:func:`read_cfg`), checked by :func:`validate`."""
    cfg = read_cfg(own_cfg, add_distill_defaults, config_file, opts)
    validate(cfg)
    for node in (cfg.MODEL.STUDENT, cfg.MODEL.TEACHER):
        several = not isinstance(node.WEIGHTS, str)
        node.WEIGHTS = [*map(absolute_file, node.WEIGHTS)] if several else absolute_file(node.WEIGHTS)
    from d2distill.classification.data.splits import read_class_names

    # The names themselves: a run folder needs no other file.
    cfg.DATASETS.CLASSES = read_class_names(cfg.DATASETS.CLASSES)
    if cfg.DATASETS.ROOT:
        cfg.DATASETS.ROOT = os.path.abspath(os.path.expanduser(cfg.DATASETS.ROOT))
    if cfg.MODEL.TEACHER.CACHE:
        cfg.MODEL.TEACHER.CACHE = os.path.abspath(os.path.expanduser(cfg.MODEL.TEACHER.CACHE))
    return cfg


def image_size(cfg: CfgNode) -> int:
    """Side in pixels of the images the networks see."""
    from d2distill.classification.data import dataset_info

    return cfg.INPUT.SIZE or dataset_info(cfg.DATASETS.NAME).image_size


def teacher_nodes(cfg: CfgNode, given: int = 0) -> list[CfgNode]:
    """One node of NAME, WEIGHTS, USE_EMA, PIXEL_MEAN, PIXEL_STD and SHARE per teacher; shares sum to 1.

    With `given` networks in the place of those named, NAME and WEIGHTS are empty.
    """
    node = cfg.MODEL.TEACHER
    names = [""] * given or _as_list(node.NAME)
    if not names:
        return []
    shares = list(node.SHARES) or [1.0] * len(names)
    weights = (not given and _as_list(node.WEIGHTS)) or [""] * len(names)
    columns = {"NAME": names, "WEIGHTS": weights, "USE_EMA": [node.USE_EMA] * len(names), "SHARES": shares}
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        one_each = any(isinstance(value, list | tuple) for value in node[key])
        columns[key] = list(node[key]) if one_each else [node[key]] * len(names)
    for key, values in columns.items():
        if len(values) != len(names):
            raise ConfigError(f"MODEL.TEACHER.{key} has {len(values)} entries for {len(names)} teachers: {values}")
    if any(share <= 0 for share in shares):
        raise ConfigError(f"MODEL.TEACHER.SHARES must be positive, but is {shares}")
    columns["SHARE"] = [share / sum(shares) for share in columns.pop("SHARES")]
    return [CfgNode(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _as_list(value: str | list[str]) -> list[str]:
    return ([value] if value else []) if isinstance(value, str) else [item for item in value if item]


def schedule_notes(cfg: CfgNode) -> list[str]:
    """What of the schedules a run of SOLVER.EPOCHS never reaches, a sentence each, for the log.

    No errors: most often a published recipe was shortened to try it out.
    """
    from d2distill.classification.solver import lowering_epochs

    solver, notes = cfg.SOLVER, []
    ends = zip(solver.STEPS, lowering_epochs(solver), strict=True)
    missed = [step for step, epoch in ends if epoch >= solver.EPOCHS]
    if solver.LR_SCHEDULE == "step" and missed:
        notes.append(
            f"SOLVER.EPOCHS is {solver.EPOCHS}: the learning rate is not lowered at {', '.join(map(str, missed))} of "
            f"SOLVER.STEPS {list(solver.STEPS)}; set STEPS to earlier epochs, or to [] for a constant rate"
        )
    warmups = {f"DISTILL.{name.upper()}.WARMUP": cfg.DISTILL[name.upper()].WARMUP for name in cfg.DISTILL.METHODS}
    for key, epochs in {"SOLVER.WARMUP_EPOCHS": solver.WARMUP_EPOCHS, **warmups}.items():
        if epochs > solver.EPOCHS:
            notes.append(f"SOLVER.EPOCHS is {solver.EPOCHS}: the run ends in the warm-up of {key} {epochs}")
    return notes


def validate(cfg: CfgNode) -> None:
    """Check what can be checked before data and weights are touched; a ConfigError says what would be right."""
    from d2distill.classification.data import dataset_info
    from d2distill.classification.solver import OPTIMIZERS, PRECISIONS, SCHEDULES

    methods, solver = chosen_methods(cfg), cfg.SOLVER
    check_rules(cfg, _RULES)
    if not cfg.MODEL.STUDENT.NAME:
        raise ConfigError("MODEL.STUDENT.NAME is empty: name the model to train, e.g. resnet8x4 or timm:resnet18")
    teachers = teacher_nodes(cfg)
    methods_needing_teacher = [name for name, method in methods.items() if method.needs_teacher]
    if methods_needing_teacher and not teachers:
        raise ConfigError(f"DISTILL.METHODS {methods_needing_teacher} need a teacher, but MODEL.TEACHER.NAME is empty")
    try:
        info = dataset_info(cfg.DATASETS.NAME)
    except ValueError as error:
        raise ConfigError(f"DATASETS.NAME: {error}") from None
    if info.multi_label:
        keys = {"INPUT.MIXUP": cfg.INPUT.MIXUP, "INPUT.CUTMIX": cfg.INPUT.CUTMIX}
        keys |= {"SOLVER.LABEL_SMOOTHING": solver.LABEL_SMOOTHING}
        keys |= {"DATALOADER.SAMPLER balanced": cfg.DATALOADER.SAMPLER == "balanced"}
        keys |= {"MODEL.TEACHER.CACHE_TOP_K": cfg.MODEL.TEACHER.CACHE_TOP_K}
        if used := [key for key, value in keys.items() if value]:
            raise ConfigError(
                f"{', '.join(used)}: needs images of one class each, but those of {info.name} have several; leave it "
                "at its default"
            )
    # They change what the student learns from, so that a run with them cannot be resumed without.
    for key, default in (("CACHE_DTYPE", "fp32"), ("CACHE_TOP_K", 0)):
        if cfg.MODEL.TEACHER[key] != default and not cfg.MODEL.TEACHER.CACHE:
            raise ConfigError(f"MODEL.TEACHER.{key} is of the files in MODEL.TEACHER.CACHE: name a folder there")
    for key, known in (("OPTIMIZER", OPTIMIZERS), ("LR_SCHEDULE", SCHEDULES), ("AMP", PRECISIONS)):
        if solver[key] not in known:
            names = ", ".join(name or "''" for name in known)
            raise ConfigError(f"SOLVER.{key} {solver[key]} is none of {names}{did_you_mean(solver[key], known)}")
    if cfg.INPUT.INTERPOLATION not in ("", "bilinear", "bicubic"):
        raise ConfigError(f"INPUT.INTERPOLATION must be bilinear or bicubic, but is {cfg.INPUT.INTERPOLATION}")
    for side, node in [("STUDENT", cfg.MODEL.STUDENT), *(("TEACHER", node) for node in teachers)]:
        for key in ("PIXEL_MEAN", "PIXEL_STD"):
            values = node[key]
            fits = NUMBERS.predicate(values) and len(values) in (0, 3)
            if not fits or (key == "PIXEL_STD" and any(value <= 0 for value in values)):
                kind = "numbers" if key == "PIXEL_MEAN" else "positive numbers"
                raise ConfigError(
                    f"MODEL.{side}.{key} takes 3 {kind} in RGB order, or none for the data set's, but is {values}"
                )
            if key == "PIXEL_STD" and values and max(values) < 1:
                raise ConfigError(
                    f"MODEL.{side}.{key} {values} is of images in 0..1, but here they are in 0..255: multiply mean and "
                    "deviation by 255"
                )
    if solver.OPTIMIZER == "DOT":
        if not 0 <= solver.DELTA < min(solver.MOMENTUM, 1 - solver.MOMENTUM):
            raise ConfigError(f"SOLVER.DELTA {solver.DELTA} must be below MOMENTUM and 1 - MOMENTUM")
        if not methods or solver.CLIP_GRAD_NORM or solver.AMP == "fp16" or solver.ACCUMULATE > 1:
            raise ConfigError("SOLVER.OPTIMIZER DOT needs a method, no CLIP_GRAD_NORM, no ACCUMULATE, no fp16")
    elif solver.OPTIMIZER == "SGD" and solver.NESTEROV and not solver.MOMENTUM:
        raise ConfigError("SOLVER.NESTEROV needs a momentum, but SOLVER.MOMENTUM is 0")
    resolve_device(cfg)
