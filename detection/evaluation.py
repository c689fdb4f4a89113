"""Average precision of a detector, by Detectron2's evaluators."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    coco_evaluation,
    inference_on_dataset,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn
from torch.utils.data import DataLoader

from d2distill.common.engine.distributed import run_on_main_process
from d2distill.common.engine.folder_lock import check_folder
from d2distill.common.engine.teacher_check import measured
from d2distill.common.engine.weight_files import weights_digest
from d2distill.common.errors import ConfigError, OutputError, writing
from d2distill.detection.data.loader import build_test_loader
from d2distill.detection.teacher import TeacherAdapter

__all__ = ["EvaluationData", "best_metric", "check_evaluators", "evaluate_detector", "measure_teacher"]

logger = logging.getLogger("detectron2.d2distill")


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator, whose AP faster-coco-eval computes: the same values but for rounding, sooner."""

    def __init__(self, name: str, **settings: Any) -> None:
        from faster_coco_eval.core.coco import COCO
        from faster_coco_eval.core.faster_eval_api import COCOeval

        # Where Detectron2 has its own compiled evaluator, if it was built with it.
        coco_evaluation.COCOeval_opt = COCOeval
        super().__init__(name, use_fast_impl=True, **settings)
        if all(isinstance(number, int) for number in (*self._coco_api.imgs, *self._coco_api.cats)):
            # The same annotations; nothing is read again.
            self._coco_api = COCO(self._coco_api.dataset)
        else:
            logger.info(f"{name} names images or classes by words: its AP is computed by pycocotools")
            self._use_fast_impl = False


def _coco_evaluator(name: str, folder: str, limit: int) -> COCOEvaluator:
    settings = {"output_dir": folder, "max_dets_per_image": limit}
    if _uses_faster_coco_eval(limit):
        return FastCOCOEvaluator(name, **settings)
    compiled = limit == 100 and coco_evaluation.COCOeval_opt is not coco_evaluation.COCOeval
    return COCOEvaluator(name, use_fast_impl=compiled, **settings)


def _uses_faster_coco_eval(limit: int) -> bool:
    # Of another number of detections per image than COCO's Detectron2 computes AP with pycocotools.
    return limit == 100 and find_spec("faster_coco_eval") is not None


class _WritingEvaluator(DatasetEvaluator):
    """An evaluator whose files cannot be written: an OutputError in all processes; a removed run folder stays so."""

    def __init__(self, evaluator: DatasetEvaluator, folder: Path, run_folder: str) -> None:
        self._evaluator, self._folder, self._run_folder = evaluator, folder, run_folder
        self.reset, self.process = evaluator.reset, evaluator.process

    def evaluate(self) -> Mapping[str, Any] | None:
        run_on_main_process(lambda: check_folder(self._run_folder))
        results = failed = None
        try:
            with writing(self._folder):
                results = self._evaluator.evaluate()
        except OutputError as error:
            failed = error
        for error in filter(None, comm.all_gather(failed)):
            raise error
        return results


#: Called with a data set's name, the folder for details, and how many detections of an image count.
_EVALUATORS: dict[str, Callable[[str, str, int], DatasetEvaluator]] = {
    "coco": _coco_evaluator,
    "lvis": lambda name, folder, limit: LVISEvaluator(name, output_dir=folder, max_dets_per_image=limit),
    "pascal_voc": lambda name, folder, limit: PascalVOCDetectionEvaluator(name),
}


def check_evaluators(cfg: CfgNode) -> None:
    """Raise a ConfigError where a data set of DATASETS.TEST, all of them registered, has no evaluator."""
    kinds = {name: MetadataCatalog.get(name).get("evaluator_type") for name in cfg.DATASETS.TEST}
    for name, kind in kinds.items():
        if kind not in _EVALUATORS:
            raise ConfigError(f"DATASETS.TEST: {name} asks for the evaluator {kind!r}; known: {', '.join(_EVALUATORS)}")
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if "coco" not in kinds.values():
        return
    if limit != 100:
        logger.info(f"TEST.DETECTIONS_PER_IMAGE: AP is of at most {limit} detections per image, COCO's own of 100")
    if _uses_faster_coco_eval(limit):
        logger.info(f"AP is computed by faster-coco-eval {version('faster-coco-eval')}")
    else:
        hint = " (`pip install faster-coco-eval` gives the same AP sooner)" if limit == 100 else ""
        logger.info(f"AP is computed by pycocotools {version('pycocotools')}{hint}")


class EvaluationData:
    """The images of DATASETS.TEST and their evaluators, which hold the annotations: each is read once and kept.

    Args:
        cfg: of the run.
        images: of :func:`.check_test_sets`; those of other sets are read when they are needed.
    """

    def __init__(self, cfg: CfgNode, images: Mapping[str, Sequence[dict[str, Any]]] | None = None) -> None:
        self._cfg, self._evaluators = cfg, {}
        self._loaders = {name: build_test_loader(cfg, name, records) for name, records in (images or {}).items()}

    def loader(self, name: str) -> DataLoader:
        """The images of a data set, one by one."""
        if name not in self._loaders:
            self._loaders[name] = build_test_loader(self._cfg, name)
        return self._loaders[name]

    def evaluator(self, name: str, folder: str) -> DatasetEvaluator:
        """The evaluator that the data set asks for; it writes the predictions into `folder`."""
        if name not in self._evaluators:
            build = _EVALUATORS[MetadataCatalog.get(name).evaluator_type]
            self._evaluators[name] = build(name, folder, self._cfg.TEST.DETECTIONS_PER_IMAGE)
        # Detectron2 takes it in the constructor, which reads the annotations, and in no other way.
        self._evaluators[name]._output_dir = folder
        return self._evaluators[name]

    def digest(self) -> str:
        """What tells the data from others: classes, folders of images, hashes of annotations (files are not parsed)."""
        facts = []
        for name in self._cfg.DATASETS.TEST:
            metadata = MetadataCatalog.get(name)
            # Detectron2's evaluator names a file of its own for other sets than those that are read from one.
            file = metadata.get("json_file") if metadata.get("image_root") else None
            if file:
                content = Path(PathManager.get_local_path(file)).read_bytes()
            else:
                content = json.dumps(DatasetCatalog.get(name), default=str).encode()
            digest = hashlib.sha256(content).hexdigest()
            facts.append([name, metadata.get("thing_classes"), metadata.get("image_root"), digest])
        return json.dumps(facts)


def best_metric(cfg: CfgNode) -> str:
    """The metric that decides which student is the best: box AP on the first data set that has annotations.

    Raises:
        ConfigError: DATASETS.TEST has none.
    """
    for name in cfg.DATASETS.TEST:
        if _is_annotated(name):
            return f"{_prefix(cfg, name)}bbox/AP"
    raise ConfigError(
        f"DATASETS.TEST {list(cfg.DATASETS.TEST)} has no annotations, by which a training finds its best student: name "
        "a data set that has; --eval-only predicts without them"
    )


def evaluate_detector(
    cfg: CfgNode,
    model: nn.Module | Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    augmented: bool = False,
    interruptible: Callable[[Iterable[Any]], Iterable[Any]] = lambda batches: batches,
    per_class: dict[str, Any] | None = None,
    folder: str = "inference",
    data: EvaluationData | None = None,
) -> dict[str, float]:
    """Metrics in percent of `model` on every data set of DATASETS.TEST.

    Args:
        cfg: of the run.
        model: returns Detectron2's results; a module does in eval mode.
        augmented: average over the scales and flips of TEST.AUG.
        interruptible: put around each data set's batches.
        per_class: is given COCO's AP of each class: ``{"per_class": {class: AP}}`` for boxes, ``per_class_segm`` for
            masks; where there are several data sets, one such dict for each. Of a class without objects it is None.
        folder: in OUTPUT_DIR, for the predictions (``<data set>/coco_instances_results.json``, in the form that COCO's
            server takes).
        data: DATASETS.TEST, where there are several evaluations; None: it is read for this one.

    Returns:
        ``{"bbox/AP": ..., "bbox/AP50": ..., ...}`` on the main process, with ``<data set>/`` before it where there are
        several; nothing elsewhere, and nothing of a data set without annotations. Where the model detects nothing at
        all they are 0.
    """
    if augmented:
        model = GeneralizedRCNNWithTTA(cfg, model)
    metrics, data = {}, data or EvaluationData(cfg)
    for name in cfg.DATASETS.TEST:
        metadata, output = MetadataCatalog.get(name), Path(cfg.OUTPUT_DIR, folder, name)
        evaluator = _WritingEvaluator(data.evaluator(name, str(output)), output, cfg.OUTPUT_DIR)
        results = inference_on_dataset(model, interruptible(data.loader(name)), evaluator)
        if not _is_annotated(name):
            logger.info(f"{name} has no annotations, so there is no AP: its predictions are in {output}")
            continue
        for task, values in results.items():
            # Without a single detection Detectron2 has no number; by the metric's definition all are 0.
            nothing = math.isnan(values["AP"])
            for metric, value in values.items():
                if not metric.startswith("AP-"):  # of each class
                    metrics[f"{_prefix(cfg, name)}{task}/{metric}"] = 0.0 if nothing else float(value)
            if per_class is not None and metadata.evaluator_type == "coco":
                # Of a single class Detectron2 gives it once.
                found = {label: values.get(f"AP-{label}", values["AP"]) for label in metadata.thing_classes}
                found = {label: 0.0 if nothing else None if math.isnan(ap) else ap for label, ap in found.items()}
                key = "per_class" if task == "bbox" else f"per_class_{task}"
                if len(cfg.DATASETS.TEST) == 1:
                    per_class[key] = found
                else:
                    per_class.setdefault(key, {})[name] = found
    return metrics


def measure_teacher(
    cfg: CfgNode, teacher: TeacherAdapter, data: EvaluationData | None = None
) -> dict[str, float | None]:
    """Metrics of a teacher on DATASETS.TEST, as ``{"teacher_bbox/AP": ..., ...}`` on all processes; None: not defined.

    The images are those of the training: of the student's size, with its own statistics. What is known already of
    this teacher on these data is not measured again. The log warns where it detects nothing, as with another order of
    classes or other pixel statistics than it was trained with. `data`: as for :func:`evaluate_detector`.
    """
    data = data or EvaluationData(cfg)
    sizes = {key: cfg.INPUT[key] for key in ("FORMAT", "MIN_SIZE_TEST", "MAX_SIZE_TEST")}
    own = {**teacher.cfg.MODEL, "WEIGHTS": "", "DEVICE": "", "TEST": teacher.cfg.TEST}
    digest = data.digest()
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    key = json.dumps([weights_digest(teacher.network), digest, sizes, limit, own], default=str)
    results = measured(key, lambda: evaluate_detector(cfg, teacher.detect, folder="inference/teacher", data=data))
    facts = ", ".join(f"{name} {value:.2f}" for name, value in results.items())
    logger.info(f"The teacher, on test images of the student's size (MIN_SIZE_TEST {sizes['MIN_SIZE_TEST']}): {facts}")
    metric = best_metric(cfg)
    if results[metric] < 1:
        logger.warning(
            f"The teacher's {metric} is {results[metric]:.2f}, as of a network not trained on these classes: check "
            "their order, TEACHER.MODEL.PIXEL_MEAN and PIXEL_STD, TEACHER.INPUT.FORMAT and its weights"
        )
    return {f"teacher_{name}": None if math.isnan(value) else value for name, value in results.items()}


def _is_annotated(name: str) -> bool:
    return MetadataCatalog.get(name).get("annotated", True)


def _prefix(cfg: CfgNode, name: str) -> str:
    return f"{name}/" if len(cfg.DATASETS.TEST) > 1 else ""
