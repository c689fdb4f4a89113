"""Training and evaluating a detector, from a configuration to a run folder."""

import functools
import logging
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier, build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from torch import nn

from d2distill.common.config import import_extensions
from d2distill.common.engine.distributed import broadcast_buffers, wrap_student
from d2distill.common.engine.run_folder import hold_run_folder, prepare_run
from d2distill.common.engine.seeding import seed_step
from d2distill.common.engine.task import Interruptible, Task
from d2distill.common.engine.trainer import Trainer
from d2distill.common.engine.weight_files import weights_digest
from d2distill.common.errors import ConfigError
from d2distill.detection.config import CfgNode, get_cfg, num_classes
from d2distill.detection.data import build_train_loader, check_test_sets, load_training_set, register_datasets
from d2distill.detection.deployed import describe_student
from d2distill.detection.evaluation import (
    EvaluationData,
    best_metric,
    check_evaluators,
    evaluate_detector,
    measure_teacher,
)
from d2distill.detection.weights import load_student

__all__ = ["build_trainer", "evaluate", "train"]

logger = logging.getLogger("detectron2.d2distill")
#: Settings that may be others when a run is resumed. The teacher's files may move: its weights are part of the run.
_MAY_CHANGE = (
    "CUDNN_BENCHMARK", "LOG_PERIOD", "LOGGERS", "REPORT.*", "VIS_PERIOD", "MODEL.DEVICE", "DISTILL.*.WEIGHT",
    "DISTILL.*.WARMUP", "TEACHER.MODEL.DEVICE", "TEACHER.CONFIG_FILE", "TEACHER.DATALOADER.*", "TEACHER.DATASETS.*",
    "TEACHER.OUTPUT_DIR", "TEACHER.SOLVER.*", "TEACHER.TEST.*", "DATASETS.REGISTER.*", "DATASETS.TEST",
    "DATALOADER.NUM_WORKERS", "TEST.*", "SOLVER.MAX_ITER", "SOLVER.BASE_LR*", "SOLVER.LR_SCHEDULER_NAME",
    "SOLVER.STEPS", "SOLVER.GAMMA", "SOLVER.NUM_DECAYS", "SOLVER.RESCALE_INTERVAL", "SOLVER.WARMUP_*",
    "SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SOLVER.WEIGHT_DECAY*", "SOLVER.BIAS_LR_FACTOR", "SOLVER.CLIP_GRADIENTS.*",
    "SOLVER.CHECKPOINT_*", "SOLVER.TEACHER_STREAM",
)  # fmt: skip


def build_trainer(
    cfg: CfgNode,
    dataset_dicts: list[dict[str, Any]],
    test_images: Mapping[str, list[dict[str, Any]]] | None = None,
) -> Trainer:
    """Detectors, methods, Detectron2's solver, data and evaluators of a checked configuration, ready to run.

    Args:
        cfg: checked.
        dataset_dicts: of :func:`load_training_set`.
        test_images: of :func:`check_test_sets`; None: they are read when they are needed.

    Raises:
        UserError: weights, classes or feature levels that do not fit.
    """
    deciding = best_metric(cfg)
    # All processes build the same, and the student is built before its teacher and the methods.
    seed_step(cfg.SEED, 0, rank=0)
    model = build_model(cfg)
    adapter = getattr(model, "teacher_adapter", None)
    if adapter is not None and not adapter.weights:
        raise ConfigError(
            "TEACHER.MODEL.WEIGHTS is empty: name the checkpoint of a trained teacher, or give under MODEL.WEIGHTS "
            "a merged file that holds one"
        )
    load_student(model, cfg.MODEL.WEIGHTS)
    optimizer = build_optimizer(cfg, model)
    train_loader, test_data = build_train_loader(cfg, dataset_dicts), EvaluationData(cfg, test_images)
    facts: dict[str, Any] = {}
    if adapter is not None:
        facts["teacher_parameters"] = sum(parameter.numel() for parameter in model.teacher.parameters())
    if adapter is not None and cfg.TEST.TEACHER and num_classes(adapter.cfg)[1] == num_classes(cfg)[1]:
        facts |= measure_teacher(cfg, adapter, test_data)
    precision = None
    if cfg.SOLVER.AMP.ENABLED:
        precision = torch.float16 if torch.device(cfg.MODEL.DEVICE).type == "cuda" else torch.bfloat16

    def evaluate_student(network: nn.Module, interruptible: Interruptible) -> dict[str, float]:
        if comm.get_world_size() > 1:
            broadcast_buffers(network)
        # An average of the student is evaluated too.
        is_student = next(network.parameters()) is next(model.parameters())
        per_class = facts if is_student else None
        return evaluate_detector(cfg, network, interruptible=interruptible, per_class=per_class, data=test_data)

    def batches_from(start: int) -> Iterable[list[dict[str, Any]]]:
        train_loader.batch_sampler.start = start
        return train_loader

    # RetinaNet's running mean of its number of foreground anchors, which it keeps outside its state dict.
    loss_normalizer = SimpleNamespace(
        state_dict=lambda: {"value": getattr(model, "loss_normalizer", None)},
        load_state_dict=lambda state: setattr(model, "loss_normalizer", state["value"]),
    )
    task = Task(
        model=model,
        # As Detectron2 does: running statistics are each process's own until they are needed.
        wrapped=wrap_student(model, broadcast_buffers=False),
        optimizer=optimizer,
        lr_scheduler=_lr_scheduler(cfg, optimizer),
        build_batches=batches_from,
        # A plain detector: stock Detectron2 loads its state dict.
        deployed_student=getattr(model, "deployed_student", lambda: model),
        evaluate=evaluate_student,
        best_metric=deciding,
        max_iter=cfg.SOLVER.MAX_ITER,
        eval_period=cfg.TEST.EVAL_PERIOD or cfg.SOLVER.MAX_ITER,
        checkpoint_periods=[cfg.SOLVER.CHECKPOINT_PERIOD],
        may_change=_MAY_CHANGE,
        run_identity={
            "training images": len(train_loader.dataset),
            "the teacher's weights": None if adapter is None else weights_digest(model.teacher),
        },
        precision=precision,
        evaluate_once=lambda network: _augmented(cfg, network, test_data),
        model_stats=lambda network: {"parameters": sum(p.numel() for p in network.parameters())},
        facts=lambda: facts,
        checkpointables={"loss_normalizer": loss_normalizer},
        finite_outputs=lambda: getattr(model, "finite", {}),
        images_per_step=cfg.SOLVER.IMS_PER_BATCH,
        default_settings=get_cfg,
        description=functools.cache(lambda: describe_student(cfg)),
    )
    return Trainer(cfg, task)


def _lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """Detectron2's schedule. SOLVER.STEPS below 1 are shares of MAX_ITER, also where it is another when resumed."""
    steps, end = cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and any(step < 1 for step in steps):
        cfg = cfg.clone()
        cfg.SOLVER.STEPS = tuple(sorted({min(round(step * end), end - 1) for step in steps} - {0}))
        logger.info(f"SOLVER.STEPS {list(steps)} of {end} iterations are after {list(cfg.SOLVER.STEPS)}")
    return build_lr_scheduler(cfg, optimizer)


def train(cfg: CfgNode, resume: bool = False) -> dict[str, float]:
    """One process's part of a training run: ``detection/train_net.py`` without its command line.

    Returns:
        Last and best metrics on the main process, e.g. ``bbox/AP`` and ``best_bbox/AP``.

    Raises:
        UserError, FileNotFoundError: something is missing or does not fit; nothing was written over.
    """
    # Does nothing unless SOLVER.REFERENCE_WORLD_SIZE is set.
    steps, cfg = cfg.SOLVER.STEPS, DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
    if any(step < 1 for step in steps):
        cfg.SOLVER.STEPS = steps  # shares of the run, which it would scale too
    with prepare_run(cfg, resume):
        register_datasets(cfg)
        dataset_dicts = load_training_set(cfg)
        test_images = check_test_sets(cfg)
        check_evaluators(cfg)
        trainer = build_trainer(cfg, dataset_dicts, test_images)
        # The loaders keep them in a compact form, which workers share.
        del dataset_dicts, test_images
        results = trainer.run(resume)
        _log("Results", results)
        return results


def evaluate(cfg: CfgNode) -> dict[str, float]:
    """Metrics of MODEL.WEIGHTS; empty on other ranks.

    Raises:
        UserError, FileNotFoundError: something is missing or does not fit.
    """
    import_extensions(cfg.IMPORTS)
    cfg = cfg.clone()
    cfg.DISTILL.METHODS = []
    # Its inference/ is written to.
    with hold_run_folder(cfg.OUTPUT_DIR, logs=None):
        register_datasets(cfg)
        data = EvaluationData(cfg, check_test_sets(cfg))
        check_evaluators(cfg)
        model = build_model(cfg)
        load_student(model, cfg.MODEL.WEIGHTS, complete=True)
        model.eval()
        results = {**evaluate_detector(cfg, model, data=data), **_augmented(cfg, model, data)}
        _log(cfg.MODEL.WEIGHTS, results)
        return results


def _log(title: str, results: dict[str, float]) -> None:
    if results:
        logger.info(f"{title}: {', '.join(f'{name} {value:.2f}' for name, value in results.items())}")


def _augmented(cfg: CfgNode, model: nn.Module, data: EvaluationData) -> dict[str, float]:
    """The same metrics over scales and flips, where TEST.AUG is enabled, under ``<metric>_TTA``."""
    results = evaluate_detector(cfg, model, augmented=True, data=data) if cfg.TEST.AUG.ENABLED else {}
    return {f"{name}_TTA": value for name, value in results.items()}
