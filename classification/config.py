"""Settings of the classification trainer: all defaults, reading, and every check that needs no data."""

import os

import torch

from d2distill.classification.data import dataset_info
from d2distill.classification.data.splits import read_class_names
from d2distill.classification.solver import OPTIMIZERS, SCHEDULES
from d2distill.common.config import CfgNode, add_distill_defaults, chosen_methods, read_cfg, resolve_device
from d2distill.common.config_node import absolute_file
from d2distill.common.errors import ConfigError, did_you_mean
from d2distill.common.rules import BELOW_ONE, INCREASING, LOGGERS, NUMBERS, STR_OR_LIST, Rule, at_least, check_rules

__all__ = ["PRECISIONS", "get_cfg", "image_size", "load_cfg", "schedule_notes", "teacher_nodes", "validate"]

#: Precisions of autocast by SOLVER.AMP.
PRECISIONS = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}
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


class _CfgNode(CfgNode):
    #: Keys that take one value, or a list of one per teacher, or per class.
    LISTABLE = ("MODEL.TEACHER.NAME", "MODEL.TEACHER.WEIGHTS", "DATASETS.CLASSES", "SOLVER.CLASS_WEIGHTS")


def get_cfg() -> CfgNode:
    """All settings with their defaults, DISTILL included."""
    cfg = _CfgNode()
    # The run folder: config, logs, checkpoints. Empty: output/<name of the config file>.
    cfg.OUTPUT_DIR = ""
    # Everything random in a run is a function of it: weights, order, augmentation, dropout.
    cfg.SEED = 0
    # Modules, or files beside the YAML that names them, to import first: own methods, models, data sets.
    cfg.IMPORTS = []
    # Let cuDNN try its algorithms; faster, but two runs may then differ in the last bits.
    cfg.CUDNN_BENCHMARK = False
    # Log every so many steps, and at each epoch's end.
    cfg.LOG_PERIOD = 20
    # Logs beside log.txt and metrics.json: tensorboard, csv (metrics.csv), wandb, mlflow. The last two are set up by
    # their environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI); a failure of theirs does not end the run.
    cfg.LOGGERS = ["tensorboard"]

    cfg.MODEL = _CfgNode()
    # 0: what the data set says.
    cfg.MODEL.NUM_CLASSES = 0
    # auto: the GPU if there is one.
    cfg.MODEL.DEVICE = "auto"
    for side in ("STUDENT", "TEACHER"):
        node = cfg.MODEL[side] = _CfgNode()
        # A model of this package, timm:NAME or torchvision:NAME. The teacher's may be a list: several teachers.
        node.NAME = ""
        # Path, URL, torchvision:WEIGHTS_ENUM or timm:NAME. Empty: random weights. Weights may be of other classes than
        # the data's: the student's classifier then stays fresh; such a teacher has features for methods, but no logits.
        node.WEIGHTS = ""
        # Of a file that has weights and their average over the training (EMA): take the average.
        node.USE_EMA = True
        # RGB, in 0..255. Empty: those of the weights (a library's, or a student's of ours), else the data set's.
        node.PIXEL_MEAN = []
        node.PIXEL_STD = []
    # Of several teachers: how much each counts. Empty: all the same. PIXEL_MEAN and _STD then are for all, or a list.
    cfg.MODEL.TEACHER.SHARES = []
    # A folder in which the teacher's outputs are kept, for each image and augmentation, and looked up the next time, by
    # all runs with this teacher on these images. Empty: none. INPUT.REPLAY_EPOCHS says when there is nothing to keep.
    cfg.MODEL.TEACHER.CACHE = ""
    # How many GB a teacher's outputs may take there: with more, the first so many images are kept.
    cfg.MODEL.TEACHER.CACHE_GB = 8.0
    # Of the logits there: fp32, as the teacher gives them; fp16, rounded by at most 1 / 2048 of their value, also for
    # the student.
    cfg.MODEL.TEACHER.CACHE_DTYPE = "fp32"
    # Keep so many of an image's logits, and spread the rest of its softmax (at temperature 1) evenly over the other
    # classes, also for the student; for data with 1000 classes and more. 0: all.
    cfg.MODEL.TEACHER.CACHE_TOP_K = 0
    # Batch norms of the student take their statistics over all processes.
    cfg.MODEL.SYNC_BN = False

    add_distill_defaults(cfg)

    cfg.DATASETS = _CfgNode()
    cfg.DATASETS.NAME = "cifar100"
    # Empty: the environment variable DETECTRON2_DATASETS, else ./datasets.
    cfg.DATASETS.ROOT = ""
    # Train on the first so many samples of a fixed shuffle. 0: all.
    cfg.DATASETS.TRAIN_SIZE = 0
    # Class names in the order of the labels: a list, or a file with a name a line, or JSON. Empty: sorted, or the data
    # set's own order.
    cfg.DATASETS.CLASSES = []
    # Evaluate on this share of each class's training images, and train on the rest. 0: on the data set's test images.
    cfg.DATASETS.VAL_FRACTION = 0.0
    # Of that draw. Not SEED: with another split the student is tested on images that its teacher was trained on.
    cfg.DATASETS.SPLIT_SEED = 0

    cfg.INPUT = _CfgNode()
    # Side of the square images the networks see. 0: the data set's; where its images are of any size, that of a student
    # that a library published.
    cfg.INPUT.SIZE = 0
    # Short side of test images in pixels before the center crop. 0: as the student was published, else SIZE / 0.875.
    cfg.INPUT.RESIZE = 0
    # Of that: bilinear or bicubic. Empty: as the student was published, else bilinear.
    cfg.INPUT.INTERPOLATION = ""
    # Turn images as their EXIF data says. torchvision's ImageFolder, and so most published results, do not.
    cfg.INPUT.EXIF_ORIENTATION = False
    # Which values of gray images of more than 8 bits become 0 and 255. Another range than that of 16 bits is for images
    # of 32 bits as well, which else are refused.
    cfg.INPUT.RANGE_16BIT = [0, 65535]
    # A recipe of classification/data/augment.py. Empty: the data set's.
    cfg.INPUT.AUGMENTATION = ""
    # Mixup (ICLR 2018) and cutmix (ICCV 2019): alpha of the Beta distribution; 0: off. Both: one of them in each step.
    cfg.INPUT.MIXUP = 0.0
    cfg.INPUT.CUTMIX = 0.0
    # Draw augmentations anew in the first so many epochs only, and repeat those in the later ones, so that as many
    # epochs of a teacher's outputs (MODEL.TEACHER.CACHE) serve the whole run: with recipes that never make an image
    # twice. It is another training, with less varied images. 0: off.
    cfg.INPUT.REPLAY_EPOCHS = 0

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
    # step: times GAMMA after each of STEPS (in epochs, or all below 1: shares of EPOCHS). cosine: to 0 at the end.
    cfg.SOLVER.LR_SCHEDULE = "step"
    cfg.SOLVER.STEPS = [150, 180, 210]
    cfg.SOLVER.GAMMA = 0.1
    # Linear, from a thousandth of BASE_LR, in epochs.
    cfg.SOLVER.WARMUP_EPOCHS = 0
    # Share of the target's probability that goes to all classes alike.
    cfg.SOLVER.LABEL_SMOOTHING = 0.0
    # Weight of each class in the cross-entropy, a list in their order, or balanced: samples / (classes * samples of the
    # class). The sum over a batch is divided by its size. Multi-label: of a class's positives; balanced: negatives /
    # positives. Empty: 1.
    cfg.SOLVER.CLASS_WEIGHTS = []
    # Run each batch in so many parts, to save memory: batch size, schedule and data order stay as they are.
    cfg.SOLVER.ACCUMULATE = 1
    # Decay of an exponential moving average of the student, evaluated and saved beside the live one. 0: none.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Largest norm of the gradient. 0: no clipping.
    cfg.SOLVER.CLIP_GRAD_NORM = 0.0
    # Automatic mixed precision: "", "bf16" or "fp16" (with loss scaling). Losses are computed in fp32 all the same.
    cfg.SOLVER.AMP = ""
    # Which networks torch.compile compiles, in a minute or more: "" none, teacher, all (the student as well). auto: the
    # teacher in runs that are long enough for it to pay off. Where it fails, a network runs eagerly; the log says so.
    cfg.SOLVER.COMPILE = "auto"
    # Replay the compiled networks as CUDA graphs: small networks do not wait for their kernels to be launched.
    cfg.SOLVER.CUDA_GRAPH = False
    # contiguous or channels_last. auto: the latter on a GPU under AMP. (Without AMP a GPU computes fp32
    # convolutions in TF32, and matrix products in fp32: torch's default.)
    cfg.SOLVER.MEMORY_FORMAT = "auto"
    # Save every so many epochs, and, if not 0, every so many steps as well. The newest KEEP files stay.
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    cfg.SOLVER.CHECKPOINT_STEPS = 0
    cfg.SOLVER.CHECKPOINT_KEEP = 2

    cfg.DATALOADER = _CfgNode()
    # Per process. The result does not depend on it.
    cfg.DATALOADER.NUM_WORKERS = 4
    # A set whose images, as the networks are given them, take up to so many GB (1e9 bytes, in each process) is kept in
    # one tensor on the device, and augmented there a batch at a time; files are read once, in the first epoch. 0: all
    # images are loaded by workers. The result does not depend on it.
    cfg.DATALOADER.RESIDENT_GB = 2.0
    # shuffle: every image once an epoch. balanced: as many, with replacement, all classes alike.
    cfg.DATALOADER.SAMPLER = "shuffle"
    # An image that cannot be read. raise: ends the run. skip: is reported, and left out; in training the next one that
    # can be read takes its place.
    cfg.DATALOADER.ON_ERROR = "raise"

    cfg.TEST = _CfgNode()
    # Measure the teacher on the test images before the training.
    cfg.TEST.TEACHER = True
    # In epochs.
    cfg.TEST.EVAL_PERIOD = 1
    cfg.TEST.IMS_PER_BATCH = 256

    cfg.REPORT = _CfgNode()
    # Write report.html at the end of the run.
    cfg.REPORT.ENABLED = True
    # The run folder of a plain baseline, which the report compares with. Empty: none.
    cfg.REPORT.BASELINE = ""
    return cfg


def load_cfg(config_file: str = "", opts: list[str] | None = None) -> CfgNode:
    """Defaults, YAML file and ``KEY VALUE`` pairs (:func:`read_cfg`), checked by :func:`validate`."""
    cfg = read_cfg(get_cfg, config_file, opts)
    validate(cfg)
    for node in (cfg.MODEL.STUDENT, cfg.MODEL.TEACHER):
        several = not isinstance(node.WEIGHTS, str)
        node.WEIGHTS = [*map(absolute_file, node.WEIGHTS)] if several else absolute_file(node.WEIGHTS)
    # The names themselves: a run folder needs no other file.
    cfg.DATASETS.CLASSES = read_class_names(cfg.DATASETS.CLASSES)
    if cfg.DATASETS.ROOT:
        cfg.DATASETS.ROOT = os.path.abspath(os.path.expanduser(cfg.DATASETS.ROOT))
    if cfg.MODEL.TEACHER.CACHE:
        cfg.MODEL.TEACHER.CACHE = os.path.abspath(os.path.expanduser(cfg.MODEL.TEACHER.CACHE))
    return cfg


def image_size(cfg: CfgNode) -> int:
    """Side in pixels of the images the networks see."""
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
    solver, notes = cfg.SOLVER, []
    missed = [step for step in solver.STEPS if step >= solver.EPOCHS]
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
