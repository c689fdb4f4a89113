"""Average precision of a detector, by Detectron2's evaluators."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    inference_on_dataset,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn

from d2distill.common.errors import ConfigError
from d2distill.detection.data.loader import build_test_loader

__all__ = ["check_evaluators", "evaluate_detector"]

_EVALUATORS: dict[str, Callable[[str, str], DatasetEvaluator]] = {
    "coco": lambda name, folder: COCOEvaluator(name, output_dir=folder),
    "lvis": lambda name, folder: LVISEvaluator(name, output_dir=folder),
    "pascal_voc": lambda name, folder: PascalVOCDetectionEvaluator(name),
}


def check_evaluators(cfg: CfgNode) -> None:
    """Raise a ConfigError where a data set of DATASETS.TEST, all of them registered, has no evaluator."""
    for name in cfg.DATASETS.TEST:
        kind = MetadataCatalog.get(name).get("evaluator_type")
        if kind not in _EVALUATORS:
            raise ConfigError(f"DATASETS.TEST: {name} asks for the evaluator {kind!r}; known: {', '.join(_EVALUATORS)}")


def evaluate_detector(
    cfg: CfgNode,
    model: nn.Module,
    augmented: bool = False,
    interruptible: Callable[[Iterable[Any]], Iterable[Any]] = lambda batches: batches,
) -> dict[str, float]:
    """Metrics in percent of `model` on every data set of DATASETS.TEST.

    Args:
        cfg: of the run; details go to its OUTPUT_DIR/inference.
        model: returns Detectron2's results in eval mode.
        augmented: average over the scales and flips of TEST.AUG.
        interruptible: put around each data set's batches.

    Returns:
        ``{"bbox/AP": ..., "bbox/AP50": ..., ...}`` on the main process, with ``<data set>/`` before it where there are
        several; nothing elsewhere. Where the model detects nothing at all they are 0.
    """
    if augmented:
        model = GeneralizedRCNNWithTTA(cfg, model)
    metrics = {}
    for name in cfg.DATASETS.TEST:
        kind = MetadataCatalog.get(name).evaluator_type
        evaluator = _EVALUATORS[kind](name, str(Path(cfg.OUTPUT_DIR, "inference", name)))
        prefix = f"{name}/" if len(cfg.DATASETS.TEST) > 1 else ""
        results = inference_on_dataset(model, interruptible(build_test_loader(cfg, name)), evaluator)
        for task, values in results.items():
            # Without a single detection Detectron2 has no number; by the metric's definition all are 0.
            nothing = math.isnan(values["AP"])
            for metric, value in values.items():
                if not metric.startswith("AP-"):  # of each class: Detectron2 shows them in a table of their own
                    metrics[f"{prefix}{task}/{metric}"] = 0.0 if nothing else float(value)
    return metrics
