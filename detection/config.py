"""Settings of the detectors: Detectron2's own, the DISTILL node, and a second set of Detectron2's for the teacher."""

import logging
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode as Detectron2CfgNode
from detectron2.config import get_cfg as detectron2_cfg
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

from d2distill.common.config import CheckedMerge, add_distill_defaults, chosen_methods, read_cfg, resolve_device
from d2distill.common.errors import ConfigError, did_you_mean
from d2distill.common.rules import (
    FRACTION,
    MOMENTUM,
    NUMBERS,
    RISING,
    TEXTS,
    Rule,
    above,
    at_least,
    check_rules,
    refuse_nan,
)
from d2distill.common.settings import as_kind

__all__ = [
    "CfgNode",
    "add_distill_config",
    "get_cfg",
    "load_cfg",
    "num_classes",
    "teacher_cfg",
    "validate",
    "zoo_weights",
]

_SIZES = Rule("a list of numbers above 0", lambda value: NUMBERS.holds(value) and all(size > 0 for size in value))
#: What single settings must be, whatever the others are. The methods check their own.
_RULES = {
    "SEED": at_least(0),
    "LOG_PERIOD": at_least(1),
    "DATASETS.TRAIN": TEXTS,
    "DATASETS.TEST": TEXTS,
    "MODEL.PIXEL_MEAN": NUMBERS,
    "MODEL.PIXEL_STD": _SIZES,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": at_least(1),
    "MODEL.RPN.POSITIVE_FRACTION": FRACTION,
    "MODEL.RPN.NMS_THRESH": at_least(0),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": at_least(1),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": FRACTION,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": at_least(0),
    "INPUT.MIN_SIZE_TRAIN": _SIZES,
    "INPUT.MAX_SIZE_TRAIN": at_least(1),
    "INPUT.MIN_SIZE_TEST": at_least(0),
    "INPUT.MAX_SIZE_TEST": at_least(1),
    "SOLVER.MAX_ITER": at_least(1),
    "SOLVER.IMS_PER_BATCH": at_least(1),
    "SOLVER.BASE_LR": above(0),
    "SOLVER.MOMENTUM": MOMENTUM,
    "SOLVER.WEIGHT_DECAY": at_least(0),
    "SOLVER.WEIGHT_DECAY_NORM": at_least(0),
    "SOLVER.STEPS": RISING,
    "SOLVER.GAMMA": above(0),
    "SOLVER.WARMUP_ITERS": at_least(0),
    "SOLVER.WARMUP_FACTOR": FRACTION,
    "SOLVER.REFERENCE_WORLD_SIZE": at_least(0),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": above(0),
    "SOLVER.ACCUMULATE": at_least(1),
    "SOLVER.EMA_DECAY": MOMENTUM,
    "SOLVER.CHECKPOINT_PERIOD": at_least(1),
    "SOLVER.CHECKPOINT_KEEP": at_least(1),
    "DATALOADER.NUM_WORKERS": at_least(0),
    "TEST.EVAL_PERIOD": at_least(0),
}


class CfgNode(CheckedMerge, Detectron2CfgNode):
    """Detectron2's CfgNode with checked merging, and without YAML that runs code.

    ``TEACHER.CONFIG_FILE`` is merged into TEACHER where it is met; what stands beside it goes over it. In a file it is
    a path from that file's own folder, as ``_BASE_`` is; where nothing is there, and on a command line, from the
    working directory.
    """

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        # Of every _BASE_ file as well: only here it is known which file names the teacher's.
        loaded = super().load_yaml_with_base(filename, allow_unsafe)
        _check_version(filename, loaded)
        teacher = loaded.get("TEACHER")
        if isinstance(teacher, dict) and isinstance(teacher.get("CONFIG_FILE"), str):
            beside = os.path.join(os.path.dirname(filename), teacher["CONFIG_FILE"])
            if os.path.isfile(beside):
                teacher["CONFIG_FILE"] = beside
        return loaded

    def merge_from_other_cfg(self, cfg_other: Detectron2CfgNode) -> None:
        teacher = cfg_other.get("TEACHER")
        file = as_kind(teacher.get("CONFIG_FILE"), (str,)) if isinstance(teacher, dict) else None
        if file and "TEACHER" in self:
            self.TEACHER = _teacher_node(type(self), file)
        super().merge_from_other_cfg(cfg_other)


def add_distill_config(cfg: Detectron2CfgNode) -> None:
    """Add to a Detectron2 configuration the nodes DISTILL and TEACHER (Detectron2's own defaults).

    The methods' defaults are those of classification, but for FIRST: all levels of a pyramid are compared.
    """
    add_distill_defaults(cfg)
    for node in cfg.DISTILL.values():
        if isinstance(node, Detectron2CfgNode) and "FIRST" in node:
            node.FIRST = 0  # a pyramid has no stem to leave out
    cfg.TEACHER = _teacher_node(type(cfg))


def get_cfg() -> CfgNode:
    """All settings with their defaults: Detectron2's, DISTILL, TEACHER, and those of the run."""
    cfg = CfgNode(detectron2_cfg())
    add_distill_config(cfg)
    # Everything random in a run is a function of it: weights, order, augmentation, sampling.
    cfg.SEED = 0
    # auto: the GPU if there is one.
    cfg.MODEL.DEVICE = "auto"
    # Empty: output/<name of the config file>.
    cfg.OUTPUT_DIR = ""
    # Modules or files (relative to the config file) to import first: own methods, backbones, data sets.
    cfg.IMPORTS = []
    # Log every so many iterations.
    cfg.LOG_PERIOD = 20
    # Own data sets: {name: {JSON: COCO annotations, IMAGES: folder}}; relative to the data folder.
    cfg.DATASETS.REGISTER = CfgNode(new_allowed=True)
    # Run each batch in so many parts, to save memory: batch size, schedule and data order stay as they are.
    cfg.SOLVER.ACCUMULATE = 1
    # Decay of an exponential moving average of the student, evaluated and saved beside the live one. 0: none.
    cfg.SOLVER.EMA_DECAY = 0.0
    # The newest so many checkpoints stay.
    cfg.SOLVER.CHECKPOINT_KEEP = 2
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


def teacher_cfg(cfg: Detectron2CfgNode) -> Detectron2CfgNode:
    """What the teacher is built from: TEACHER with its CONFIG_FILE, on the student's device.

    Detectron2's own CfgNode does not merge the file by itself: then what differs from Detectron2's defaults goes
    over it.
    """
    node = cfg.TEACHER.clone()
    if not isinstance(cfg, CheckedMerge) and node.CONFIG_FILE:
        node = _teacher_node(type(cfg), node.CONFIG_FILE)
        _merge_difference(node, cfg.TEACHER, _teacher_node(type(cfg)))
    node.defrost()
    node.MODEL.DEVICE = cfg.MODEL.DEVICE
    return node


def zoo_weights(config_file: str) -> str:
    """The trained weights that belong to a configuration of Detectron2's zoo; empty for any other."""
    return "" if not config_file or os.path.isfile(config_file) else _of_zoo(config_file)[1]


def num_classes(cfg: Detectron2CfgNode) -> tuple[str, int]:
    """The key that holds the detector's number of classes, and its value (the background not counted)."""
    key = "RETINANET" if "retinanet" in cfg.MODEL.META_ARCHITECTURE.lower() else "ROI_HEADS"
    return f"MODEL.{key}.NUM_CLASSES", cfg.MODEL[key].NUM_CLASSES


def validate(cfg: CfgNode) -> None:
    """Check what can be checked before data and weights are touched; resolves MODEL.DEVICE "auto".

    Raises:
        ConfigError: with the key, its value, and what would be right.
    """
    # Not above: they are built from configurations.
    from d2distill.detection.meta_arch import DistillDetector

    methods, name = chosen_methods(cfg), cfg.MODEL.META_ARCHITECTURE
    check_rules(cfg, {**_RULES, num_classes(cfg)[0]: at_least(1)})
    refuse_nan(cfg)
    if name not in META_ARCH_REGISTRY:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE {name}: there is no such one{did_you_mean(name, dict(META_ARCH_REGISTRY))}"
        )
    if methods and not issubclass(META_ARCH_REGISTRY.get(name), DistillDetector):
        raise ConfigError(
            f"DISTILL.METHODS {list(methods)} need MODEL.META_ARCHITECTURE DistillRCNN or DistillRetinaNet, but it is "
            f"{name}"
        )
    needy = [method for method, kind in methods.items() if kind.needs_teacher]
    if needy and cfg.TEACHER == _teacher_node(type(cfg)):
        raise ConfigError(
            f"DISTILL.METHODS {needy} need a teacher: name its configuration in TEACHER.CONFIG_FILE, a YAML or a name "
            "of Detectron2's zoo, e.g. COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"
        )
    if cfg.TEST.AUG.ENABLED:
        # At the end of the training Detectron2 would only assert it.
        if not issubclass(META_ARCH_REGISTRY.get(name), GeneralizedRCNN):
            raise ConfigError(f"TEST.AUG.ENABLED is for R-CNNs, not for {name}: set it to False")
        if cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS:
            raise ConfigError("TEST.AUG.ENABLED goes with neither MODEL.KEYPOINT_ON nor MODEL.LOAD_PROPOSALS")
    for method in methods:
        if cfg.DISTILL[method.upper()].get("TEACHER", 0) != 0:
            raise ConfigError(f"DISTILL.{method.upper()}.TEACHER must be 0: a detector has one teacher")
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise ConfigError("TEST.PRECISE_BN.ENABLED: it reads batches of its own, after which no run resumes exactly")
    if cfg.VIS_PERIOD and find_spec("cv2") is None:
        raise ConfigError(
            "VIS_PERIOD: Detectron2 draws with OpenCV: pip install opencv-python-headless, or set it to 0"
        )
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and cfg.SOLVER.MAX_ITER in cfg.SOLVER.STEPS:
        # fvcore would say it of its own arguments, once networks and data are there.
        raise ConfigError(f"SOLVER.STEPS {cfg.SOLVER.STEPS} holds MAX_ITER, where the training has ended: leave it out")
    if cfg.DISTILL.CE_WEIGHT != 1.0:
        raise ConfigError("DISTILL.CE_WEIGHT is the classifiers': a detector's own losses keep their weights")
    if not cfg.DATASETS.TRAIN or not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TRAIN and DATASETS.TEST must each name a data set")
    cfg.MODEL.DEVICE = str(resolve_device(cfg))


def _teacher_node(kind: type[Detectron2CfgNode], config_file: str = "") -> Detectron2CfgNode:
    node = detectron2_cfg()
    # A detector's configuration names the weights that its training begins with: they make no teacher.
    weights = ""
    if config_file:
        path, weights = (config_file, "") if os.path.isfile(config_file) else _of_zoo(config_file)
        # Among all our keys, for it may be the configuration of a run of ours.
        full = get_cfg()
        # Detectron2's own RetinaNet has YAML that computes; a file of another origin must do without.
        trusted = path != config_file
        log = logging.getLogger("fvcore.common.config")
        try:
            log.disabled = trusted  # it would warn of it
            full.merge_from_file(path, allow_unsafe=trusted)
        except ConfigError as error:
            raise ConfigError(f"TEACHER.CONFIG_FILE {error}") from error  # which begins with the file
        finally:
            log.disabled = False
        _take(node, full)
    node = kind(node)
    # A path, or a name of Detectron2's model zoo; the weights are then the zoo's, unless TEACHER.MODEL.WEIGHTS is set.
    node.CONFIG_FILE = config_file
    node.MODEL.WEIGHTS = weights
    return node


def _check_version(filename: str, loaded: dict[str, Any]) -> None:
    """Check what Detectron2 looks at, before anything is merged, to tell the version of a file."""
    version = loaded.get("VERSION", 2)
    if version not in (1, 2):
        raise ConfigError(f"{filename}: VERSION is {version!r}, but must be 1 or 2, Detectron2's; leave it out")
    for key in ("MODEL", "TEST"):
        if not isinstance(loaded.get(key, {}), dict):
            given = "nothing" if loaded[key] is None else repr(loaded[key])
            raise ConfigError(f"{filename}: config key {key} is a node with keys below it, but was given {given}")


def _of_zoo(name: str) -> tuple[str, str]:
    """Configuration and trained weights of a model of Detectron2's zoo."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it imports pkg_resources, which says that it is old
        from detectron2 import model_zoo
    try:
        if not name.endswith(".yaml"):
            raise RuntimeError
        return model_zoo.get_config_file(name), model_zoo.get_checkpoint_url(name)
    except RuntimeError:
        raise ConfigError(
            f"TEACHER.CONFIG_FILE {name} is neither a file (looked in {Path.cwd()}) nor a YAML with weights in "
            "Detectron2's model zoo, e.g. COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"
        ) from None


def _take(node: Detectron2CfgNode, full: Detectron2CfgNode) -> None:
    """Give the keys of `node` their values in `full`, which has more of them."""
    for key, value in node.items():
        if isinstance(value, Detectron2CfgNode):
            _take(value, full[key])
        else:
            node[key] = full[key]


def _merge_difference(node: Detectron2CfgNode, given: Detectron2CfgNode, default: Detectron2CfgNode) -> None:
    """Give `node` what `given` has that is not in, or not as in, `default`; CONFIG_FILE aside."""
    for key, value in given.items():
        if isinstance(value, Detectron2CfgNode) and key in default:
            _merge_difference(node[key], value, default[key])
        elif key != "CONFIG_FILE" and (key not in default or value != default[key]):
            node[key] = value
