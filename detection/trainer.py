"""Training and evaluating a detector, from a configuration to a run folder."""

import logging
from typing import Any

import torch
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from torch import Tensor, nn

from d2distill.common.config import import_extensions
from d2distill.common.engine.distributed import broadcast_buffers, wrap_student
from d2distill.common.engine.run import RunTrainer, prepare_run, start_logs
from d2distill.common.engine.trainer import seed_step
from d2distill.common.errors import ConfigError
from d2distill.detection.config import CfgNode
from d2distill.detection.data import build_train_loader, check_test_sets, load_training_set, register_datasets
from d2distill.detection.evaluation import check_evaluators, evaluate_detector
from d2distill.detection.weights import load_student

__all__ = ["DetectionTrainer", "evaluate", "train"]

logger = logging.getLogger("detectron2.d2distill")
#: What belongs to training alone.
_BESIDE_THE_STUDENT = ("teacher.", "distillers.")


class DetectionTrainer(RunTrainer):
    """Iterations over COCO-like data, with Detectron2's solver, evaluators and logs.

    Args:
        cfg: a checked configuration.
        dataset_dicts: the training set.

    Raises:
        UserError: weights, classes or feature levels that do not fit.
    """

    fixed = (
        "SEED",
        "SOLVER.IMS_PER_BATCH",
        "DATASETS.TRAIN",
        "DATALOADER.SAMPLER_TRAIN",
        "MODEL.META_ARCHITECTURE",
        "MODEL.BACKBONE.NAME",
        "MODEL.RESNETS.DEPTH",
        "TEACHER.MODEL.META_ARCHITECTURE",
        "TEACHER.MODEL.BACKBONE.NAME",
        "TEACHER.MODEL.RESNETS.DEPTH",
        "DISTILL.METHODS",
        "SOLVER.AMP.ENABLED",
    )

    def __init__(self, cfg: CfgNode, dataset_dicts: list[dict[str, Any]]) -> None:
        # All processes build the same, and the student is built before its teacher and the methods.
        seed_step(cfg.SEED, 0, rank=0)
        self.detector = build_model(cfg)
        view = getattr(self.detector, "teacher_view", None)
        if view is not None and not view.weights:
            raise ConfigError(
                "TEACHER.MODEL.WEIGHTS is empty: name the checkpoint of a trained teacher, or give under MODEL.WEIGHTS "
                "a merged file that holds one"
            )
        load_student(self.detector, cfg.MODEL.WEIGHTS)
        optimizer = build_optimizer(cfg, self.detector)
        precision = None
        if cfg.SOLVER.AMP.ENABLED:
            precision = torch.float16 if torch.device(cfg.MODEL.DEVICE).type == "cuda" else torch.bfloat16
        task = "bbox/AP" if len(cfg.DATASETS.TEST) == 1 else f"{cfg.DATASETS.TEST[0]}/bbox/AP"
        super().__init__(
            cfg,
            # As Detectron2 has it: running statistics are each process's own until they are needed.
            wrap_student(self.detector, broadcast_buffers=False),
            self.detector,
            optimizer,
            lambda start: build_train_loader(cfg, dataset_dicts, start),
            build_lr_scheduler(cfg, optimizer),
            max_iter=cfg.SOLVER.MAX_ITER,
            test_period=cfg.TEST.EVAL_PERIOD or cfg.SOLVER.MAX_ITER,
            select=task,
            facts={"training images": len(dataset_dicts)},
            precision=precision,
        )

    def test(self) -> dict[str, float]:
        """Average precisions in percent, see :func:`evaluate_detector`."""
        if comm.get_world_size() > 1:
            broadcast_buffers(self.detector)
        return evaluate_detector(self.cfg, self.detector, watched=self.watched)

    def student_state(self) -> dict[str, Tensor]:
        """The plain detector: stock Detectron2 loads it."""
        state = self.detector.state_dict()
        return {name: value for name, value in state.items() if not name.startswith(_BESIDE_THE_STUDENT)}

    def cost(self) -> dict[str, float]:
        children = ((name + ".", child) for name, child in self.detector.named_children())
        parts = [child for name, child in children if name not in _BESIDE_THE_STUDENT]
        return {"parameters": sum(p.numel() for part in parts for p in part.parameters())}

    def run(self, start: int = 0) -> dict[str, float]:
        """Train from iteration `start` to the end; last and best metrics on the main process."""
        return super().run(start, [self.cfg.SOLVER.CHECKPOINT_PERIOD])

    def last_test(self) -> dict[str, float]:
        """The same average precisions over scales and flips, where TEST.AUG is enabled, under ``<metric>_TTA``."""
        return _augmented(self.cfg, self.detector)

    def state_dict(self) -> dict[str, Any]:
        # RetinaNet keeps a running mean of its number of foreground anchors outside its state dict.
        return {**super().state_dict(), "loss_normalizer": getattr(self.detector, "loss_normalizer", None)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict["loss_normalizer"] is not None:
            self.detector.loss_normalizer = state_dict["loss_normalizer"]


def train(cfg: CfgNode, resume: bool = False) -> dict[str, float]:
    """One process's part of a training run: ``detection/train_net.py`` without its command line.

    Returns:
        Last and best metrics on the main process, e.g. ``bbox/AP`` and ``best_bbox/AP``.

    Raises:
        UserError, FileNotFoundError: something is missing or does not fit; nothing was written over.
    """
    # Does nothing unless SOLVER.REFERENCE_WORLD_SIZE is set.
    cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
    prepare_run(cfg, resume)
    register_datasets(cfg)
    dataset_dicts = load_training_set(cfg)
    check_test_sets(cfg)
    check_evaluators(cfg)
    start_logs(cfg.OUTPUT_DIR)
    trainer = DetectionTrainer(cfg, dataset_dicts)
    results = trainer.run(trainer.resume() if resume else 0)
    if results:
        logger.info(f"Results: {', '.join(f'{name} {value:.2f}' for name, value in results.items())}")
    return results


def evaluate(cfg: CfgNode) -> dict[str, float]:
    """Metrics of MODEL.WEIGHTS; empty on other ranks.

    Raises:
        UserError, FileNotFoundError: something is missing or does not fit.
    """
    import_extensions(cfg.IMPORTS)
    cfg = cfg.clone()
    cfg.DISTILL.METHODS = []
    register_datasets(cfg)
    check_test_sets(cfg)
    check_evaluators(cfg)
    start_logs(None)
    model = build_model(cfg)
    load_student(model, cfg.MODEL.WEIGHTS, complete=True)
    model.eval()
    return {**evaluate_detector(cfg, model), **_augmented(cfg, model)}


def _augmented(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    results = evaluate_detector(cfg, model, augmented=True) if cfg.TEST.AUG.ENABLED else {}
    return {f"{name}_TTA": value for name, value in results.items()}
