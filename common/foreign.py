"""What other distillation libraries call things, for those who come from them."""

from collections.abc import Container, Mapping
from typing import Any

__all__ = ["FLAGS", "is_of_mdistiller", "our_key", "similar_key"]

_DETECTOR_TYPE = "KD.TYPE"
#: MDistiller's keys for which there is one here.
_KEYS = {
    "DATASET.TYPE": "DATASETS.NAME",
    "DATASET.NUM_WORKERS": "DATALOADER.NUM_WORKERS",
    "DATASET.TEST.BATCH_SIZE": "TEST.IMS_PER_BATCH",
    "DISTILLER.TYPE": "DISTILL.METHODS",
    "DISTILLER.TEACHER": "MODEL.TEACHER.NAME",
    "DISTILLER.STUDENT": "MODEL.STUDENT.NAME",
    "EXPERIMENT.NAME": "OUTPUT_DIR",
    "EXPERIMENT.TAG": "OUTPUT_DIR",
    "EXPERIMENT.PROJECT": "OUTPUT_DIR",
    "LOG.PREFIX": "OUTPUT_DIR",
    "LOG.WANDB": "LOGGERS",
    "LOG.SAVE_CHECKPOINT_FREQ": "SOLVER.CHECKPOINT_PERIOD",
    "LOG.TENSORBOARD_FREQ": "LOG_PERIOD",
    "SOLVER.BATCH_SIZE": "SOLVER.IMS_PER_BATCH",
    "SOLVER.LR": "SOLVER.BASE_LR",
    "SOLVER.LR_DECAY_STAGES": "SOLVER.STEPS",
    "SOLVER.LR_DECAY_RATE": "SOLVER.GAMMA",
    "SOLVER.TRAINER": "SOLVER.OPTIMIZER",
    "SOLVER.TYPE": "SOLVER.OPTIMIZER",
    "SOLVER.DOT.DELTA": "SOLVER.DELTA",
    _DETECTOR_TYPE: "DISTILL.METHODS",
}
#: Of a method's node.
_RENAMED = {
    "TEMPERATURE": "T",
    "NCE.TEMPERATURE": "T",
    "NCE.K": "K",
    "NCE.MOMENTUM": "MOMENTUM",
    "FEAT.DIM": "FEAT_DIM",
    "PDIST.EPSILON": "EPS",
    "PDIST.SQUARED": "SQUARED",
    "INIT_PRED_VAR": "INIT_VAR",
    "WARMUP_EPOCHS": "WARMUP",
    "STU_PREACT": "STUDENT_PREACT",
    "LOSS.FEAT_WEIGHT": "WEIGHT",
    "LOSS.KD_WEIGHT": "WEIGHT",
    "REVIEWKD_WEIGHT": "WEIGHT",
    "LOSS_WEIGHT": "WEIGHT",
}
#: Flags of MDistiller, RepDistiller, torchdistill and MMRazor, and what they are called here.
FLAGS = {
    "--cfg": "--config-file FILE",
    "--path_t": "MODEL.TEACHER.NAME NAME MODEL.TEACHER.WEIGHTS FILE",
    "--path-t": "MODEL.TEACHER.NAME NAME MODEL.TEACHER.WEIGHTS FILE",
    "--model_s": "MODEL.STUDENT.NAME NAME",
    "--distill": "DISTILL.METHODS [NAME]",
    "--trial": "SEED N",
    "-r": "DISTILL.CE_WEIGHT X",
    "--gamma": "DISTILL.CE_WEIGHT X",
    "-a": "DISTILL.KD.WEIGHT X, with KD in DISTILL.METHODS",
    "--alpha": "DISTILL.KD.WEIGHT X, with KD in DISTILL.METHODS",
    "-b": "DISTILL.<METHOD>.WEIGHT X",
    "--beta": "DISTILL.<METHOD>.WEIGHT X",
    "--kd_T": "DISTILL.KD.T X",
    "--dataset": "DATASETS.NAME NAME",
    "--batch_size": "SOLVER.IMS_PER_BATCH N",
    "--epochs": "SOLVER.EPOCHS N",
    "--learning_rate": "SOLVER.BASE_LR X",
    "--lr": "SOLVER.BASE_LR X",
    "--lr_decay_epochs": "SOLVER.STEPS [N,N]",
    "--lr_decay_rate": "SOLVER.GAMMA X",
    "--weight_decay": "SOLVER.WEIGHT_DECAY X",
    "--momentum": "SOLVER.MOMENTUM X",
    "--num_workers": "DATALOADER.NUM_WORKERS N",
    "--test_only": "--eval-only",
    "-test_only": "--eval-only",
    "--seed": "SEED N",
    "--work-dir": "OUTPUT_DIR DIR",
    "--cfg-options": "KEY VALUE pairs",
    "--amp": "SOLVER.AMP bf16 (detectors: SOLVER.AMP.ENABLED True)",
}


def our_key(key: str, methods: Mapping[str, Container[str]]) -> str:
    """Our name of MDistiller's key; empty where there is none.

    Args:
        methods: the settings of each method, by its node below DISTILL.
    """
    node, _, rest = key.partition(".")
    if _DETECTOR_TYPE.startswith(f"{node}.") and rest.partition(".")[0] in methods:
        node, _, rest = rest.partition(".")
    if key in _KEYS or node not in methods:
        return _KEYS.get(key, "")
    if rest in ("CE_WEIGHT", "LOSS.CE_WEIGHT"):
        return "DISTILL.CE_WEIGHT"
    name = _RENAMED.get(rest, rest)
    return f"DISTILL.{node}.{name}" if name in methods[node] else ""


def similar_key(key: str) -> str:
    """Our name of a key that is MDistiller's but for underscores and case; empty where there is none."""
    plain = key.replace("_", "").upper()
    return next((ours for theirs, ours in _KEYS.items() if theirs.replace("_", "") == plain), "")


def is_of_mdistiller(settings: Mapping[str, Any]) -> bool:
    """Whether a YAML file's settings are those of an MDistiller configuration, for classifiers or detectors."""
    node, key = _DETECTOR_TYPE.split(".")
    of_detector = isinstance(settings.get(node), dict) and key in settings[node]
    return "DISTILLER" in settings or of_detector or {"EXPERIMENT", "DATASET"} <= settings.keys()
