"""Settings of the detectors: Detectron2's own, the DISTILL node, and a second set of Detectron2's for the teacher."""

import logging
import os
import warnings
from collections.abc import Mapping
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode as Detectron2CfgNode
from detectron2.config import get_cfg as detectron2_cfg
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN, ProposalNetwork, SemanticSegmentor

from d2distill.common.config import (
    CheckedMerge,
    add_distill_defaults,
    chosen_methods,
    read_cfg,
    resolve_device,
)
from d2distill.common.config_node import absolute_file, overlay, parse_as
from d2distill.common.data.locate import data_path
from d2distill.common.errors import ConfigError, did_you_mean
from d2distill.common.rules import at_least, check_rules
from d2distill.detection.rules import RULES, check_network_input

__all__ = [
    "CfgNode",
    "add_distill_config",
    "check_keys",
    "copy_settings",
    "get_cfg",
    "load_cfg",
    "num_classes",
    "teacher_cfg",
    "validate",
    "zoo_weights",
]


class CfgNode(CheckedMerge, Detectron2CfgNode):
    """Detectron2's CfgNode with strict merging, in which TEACHER follows TEACHER.CONFIG_FILE.

    The teacher's settings are Detectron2's defaults, over them those of its CONFIG_FILE, and over them every key that
    was merged by its own name, whichever comes first. In a YAML file CONFIG_FILE is looked for beside that file, as
    ``_BASE_`` is; then, and on a command line, in the working directory; then in Detectron2's model zoo.
    """

    #: What was merged into TEACHER by name, as nested dicts.
    given_to_teacher: Mapping[str, Any] = {}

    def merge_from_other_cfg(self, cfg_other: Mapping[str, Any]) -> None:
        new = parse_as(cfg_other.get("TEACHER"), (dict,)) if "TEACHER" in self else None
        if new is None:
            return super().merge_from_other_cfg(cfg_other)
        earlier, other_file, every_key = self.given_to_teacher, "CONFIG_FILE" in new, detectron2_cfg().keys()
        if other_file and every_key <= earlier.keys():
            # From a run's config.yaml, which names every key: what its own CONFIG_FILE had said is not meant to stay.
            earlier = _difference(self.TEACHER, _teacher_node(type(self), self.TEACHER.CONFIG_FILE))
        super().merge_from_other_cfg(cfg_other)
        given = deepcopy(dict(earlier))
        overlay(given, new)
        if other_file and not every_key <= new.keys():
            self.TEACHER = _teacher_node(type(self), self.TEACHER.CONFIG_FILE)
            self.TEACHER.merge_from_other_cfg({**given, "CONFIG_FILE": self.TEACHER.CONFIG_FILE})
        # Past yacs, which takes an attribute for a key.
        object.__setattr__(self, "given_to_teacher", given)


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
    cfg = _own_cfg()
    add_distill_config(cfg)
    return cfg


def _own_cfg() -> CfgNode:
    """All settings but DISTILL and TEACHER."""
    cfg = CfgNode(detectron2_cfg())
    # Everything random in a run is a function of it: weights, order, augmentation, sampling.
    cfg.SEED = 0
    # auto: the GPU if there is one.
    cfg.MODEL.DEVICE = "auto"
    # Empty: output/<name of the config file>.
    cfg.OUTPUT_DIR = ""
    # Modules, or files beside the YAML that names them, to import first: own methods, backbones, data sets.
    cfg.IMPORTS = []
    # Log every so many iterations.
    cfg.LOG_PERIOD = 20
    # Logs beside log.txt and metrics.json: tensorboard, csv (metrics.csv), wandb, mlflow. The last two are set up by
    # their environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI); a failure of theirs does not end the run.
    cfg.LOGGERS = ["tensorboard"]
    # Own data sets: {name: {JSON: COCO annotations, IMAGES: folder}}; relative to the data folder.
    cfg.DATASETS.REGISTER = CfgNode(new_allowed=True)
    # The share of the images that RandomSubsetTrainingSampler trains on, drawn by SEED.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0
    # Measure the teacher on DATASETS.TEST before the training, where it has the student's classes.
    cfg.TEST.TEACHER = True
    # Run each batch in so many parts, to save memory: batch size, schedule and data order stay as they are.
    cfg.SOLVER.ACCUMULATE = 1
    # Decay of an exponential moving average of the student, evaluated and saved beside the live one. 0: none.
    cfg.SOLVER.EMA_DECAY = 0.0
    # On a GPU the teacher's backbone runs on a CUDA stream of its own, beside the student. Off saves some memory.
    cfg.SOLVER.TEACHER_STREAM = True
    # The newest so many checkpoints stay.
    cfg.SOLVER.CHECKPOINT_KEEP = 2
    cfg.REPORT = CfgNode()
    # Write report.html at the end of the run.
    cfg.REPORT.ENABLED = True
    # The run folder of a plain baseline, which the report compares with. Empty: none.
    cfg.REPORT.BASELINE = ""
    return cfg


def check_keys(config_file: str = "", opts: list[str] | None = None) -> None:
    """Raise what :func:`load_cfg` does for wrong keys, types and methods, and import no more than that needs."""
    chosen_methods(read_cfg(_own_cfg, add_distill_config, config_file, opts))


def load_cfg(config_file: str = "", opts: list[str] | None = None) -> CfgNode:
    """Defaults, YAML file and ``KEY VALUE`` pairs (:func:`read_cfg`), checked by :func:`validate`."""
    cfg = read_cfg(_own_cfg, add_distill_config, config_file, opts)
    for node in (cfg.MODEL, cfg.TEACHER.MODEL):
        node.WEIGHTS = absolute_file(node.WEIGHTS)
    for entry in cfg.DATASETS.REGISTER.values():
        if isinstance(entry, dict):
            entry.update({key: str(data_path(path)) for key, path in entry.items() if path and isinstance(path, str)})
    validate(cfg)
    return cfg


def teacher_cfg(cfg: Detectron2CfgNode) -> Detectron2CfgNode:
    """What the teacher is built from: TEACHER with its CONFIG_FILE, on the student's device.

    Detectron2's own CfgNode does not follow CONFIG_FILE: there, what differs from Detectron2's defaults goes over it.
    """
    node = cfg.TEACHER.clone()
    if not isinstance(cfg, CfgNode) and node.CONFIG_FILE:
        given = _difference(node, _teacher_node(CfgNode))
        node = _teacher_node(CfgNode, node.CONFIG_FILE)
        node.set_new_allowed(True)
        node.merge_from_other_cfg({**given, "CONFIG_FILE": node.CONFIG_FILE})
    node.defrost()
    node.MODEL.DEVICE = cfg.MODEL.DEVICE
    return node


def _model_zoo() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it imports pkg_resources, which warns of being old
        from detectron2 import model_zoo
    return model_zoo


def zoo_weights(config_file: str) -> str:
    """The trained weights that belong to a configuration of Detectron2's zoo; empty for any other."""
    try:
        return "" if os.path.isfile(config_file) else _model_zoo().get_checkpoint_url(config_file)
    except RuntimeError:
        return ""


def num_classes(cfg: Detectron2CfgNode) -> tuple[str, int]:
    """The key that holds the detector's number of classes, and its value, without the background; 0: the data's."""
    key = "RETINANET" if "retinanet" in cfg.MODEL.META_ARCHITECTURE.lower() else "ROI_HEADS"
    return f"MODEL.{key}.NUM_CLASSES", cfg.MODEL[key].NUM_CLASSES


def validate(cfg: CfgNode) -> None:
    """Check what can be checked before data and weights are touched; resolves MODEL.DEVICE "auto".

    Raises:
        ConfigError: with the key, its value, and what would be right.
    """
    methods, name = chosen_methods(cfg), cfg.MODEL.META_ARCHITECTURE
    check_rules(cfg, RULES)
    check_rules(cfg, {at_least(0): (num_classes(cfg)[0],)})
    for prefix, node in (("", cfg), ("TEACHER.", cfg.TEACHER)):
        check_network_input(prefix, node)
    if name not in META_ARCH_REGISTRY:
        raise ConfigError(f"MODEL.META_ARCHITECTURE: no {name}{did_you_mean(name, dict(META_ARCH_REGISTRY))}")
    meta_arch = META_ARCH_REGISTRY.get(name)
    if issubclass(meta_arch, ProposalNetwork | SemanticSegmentor | PanopticFPN):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE {name} does not detect objects of classes: use GeneralizedRCNN or RetinaNet, or "
            "DistillRCNN or DistillRetinaNet with a teacher"
        )
    if methods and not getattr(meta_arch, "takes_methods", False):
        raise ConfigError(
            f"DISTILL.METHODS {list(methods)} need MODEL.META_ARCHITECTURE DistillRCNN or DistillRetinaNet, but it is "
            f"{name}"
        )
    need_teacher = [method for method, kind in methods.items() if kind.needs_teacher]
    if need_teacher and cfg.TEACHER == _teacher_node(type(cfg)):
        raise ConfigError(
            f"DISTILL.METHODS {need_teacher} need a teacher: name its configuration in TEACHER.CONFIG_FILE, "
            "a YAML or a name of Detectron2's zoo, e.g. COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"
        )
    for method in methods:
        if cfg.DISTILL[method.upper()].get("TEACHER", 0) != 0:
            raise ConfigError(f"DISTILL.{method.upper()}.TEACHER must be 0: a detector has one teacher")
    if cfg.DISTILL.CE_WEIGHT != 1.0:
        raise ConfigError("DISTILL.CE_WEIGHT is the classifiers': a detector's own losses keep their weights")
    if cfg.TEST.AUG.ENABLED and not issubclass(meta_arch, GeneralizedRCNN):
        # Detectron2 would only assert it, at the end of the training.
        raise ConfigError(f"TEST.AUG.ENABLED is for R-CNNs, not for {name}: set it to False")
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise ConfigError("TEST.PRECISE_BN.ENABLED: it reads batches of its own, after which no run resumes exactly")
    if cfg.VIS_PERIOD and find_spec("cv2") is None:
        raise ConfigError(
            "VIS_PERIOD: Detectron2 draws with OpenCV: pip install opencv-python-headless, or set it to 0"
        )
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and cfg.SOLVER.MAX_ITER in cfg.SOLVER.STEPS:
        # fvcore would say it of its own arguments, once networks and data are there.
        raise ConfigError(f"SOLVER.STEPS {cfg.SOLVER.STEPS} holds MAX_ITER, where the training has ended: leave it out")
    reference, batch = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference and batch % reference:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {batch} must be a multiple of SOLVER.REFERENCE_WORLD_SIZE {reference}, the number "
            "of processes that the schedule is written for"
        )
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR":
        raise ConfigError(
            "SOLVER.LR_SCHEDULER_NAME WarmupStepWithFixedGammaLR: fvcore's schedule fails after the last step; write "
            "its steps as shares in SOLVER.STEPS, with WarmupMultiStepLR"
        )
    if not cfg.DATASETS.TRAIN or not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TRAIN and DATASETS.TEST must each name a data set")
    cfg.MODEL.DEVICE = str(resolve_device(cfg))


def _teacher_node(kind: type[Detectron2CfgNode], config_file: str = "") -> Detectron2CfgNode:
    """Detectron2's settings with those of a file, or of a model of its zoo; its weights are the zoo's, or none."""
    config_file, node, weights = absolute_file(config_file), detectron2_cfg(), ""
    if os.path.isfile(config_file):
        # It may be a student's configuration of ours. Its MODEL.WEIGHTS are those that its training begins with.
        full = get_cfg()
        settings = CfgNode.load_yaml_with_base(config_file)
        try:
            full.merge_from_other_cfg({k: v for k, v in settings.items() if k not in ("DISTILL", "TEACHER", "IMPORTS")})
        except ConfigError as error:
            raise ConfigError(f"TEACHER.CONFIG_FILE {config_file}: {error}") from error
        copy_settings(node, full)
    elif config_file:
        node, weights = _zoo_cfg(config_file)
    node = kind(node)
    node.MODEL.WEIGHTS = weights
    # A path, or a name of Detectron2's model zoo.
    node.CONFIG_FILE = config_file
    return node


def _zoo_cfg(name: str) -> tuple[Detectron2CfgNode, str]:
    """A configuration of the model zoo and its trained weights."""
    if name.endswith(".yaml") and (weights := zoo_weights(name)):
        log = logging.getLogger("fvcore.common.config")
        log.disabled = True  # Detectron2's own RetinaNet has YAML that computes, of which it would warn
        try:
            return _model_zoo().get_config(name), weights
        finally:
            log.disabled = False
    raise ConfigError(
        f"TEACHER.CONFIG_FILE {name} is neither a file (looked in {Path.cwd()}) nor a YAML with weights in "
        "Detectron2's model zoo, e.g. COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"
    )


def copy_settings(node: Detectron2CfgNode, full: Detectron2CfgNode) -> None:
    """Give the keys of `node` their values in `full`, which has more of them."""
    for key, value in node.items():
        if isinstance(value, Detectron2CfgNode):
            copy_settings(value, full[key])
        else:
            node[key] = full[key]


def _difference(node: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `node` that are not in `other`, or are not the same there."""
    found = {}
    for key, value in node.items():
        if isinstance(value, dict) and key in other:
            if below := _difference(value, other[key]):
                found[key] = below
        elif key not in other or value != other[key]:
            found[key] = value
    return found
