"""Training and evaluating a classifier, from a configuration to a run folder."""

import functools
import logging
from pathlib import Path
from typing import Any

from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from torch import Tensor, nn

from d2distill.classification.config import get_cfg, schedule_notes
from d2distill.classification.data import ImageDataset
from d2distill.classification.data.augment import build_augmentation
from d2distill.classification.data.datasets import shortened
from d2distill.classification.data.describe import describe_dataset
from d2distill.classification.data.loader import EpochBatchSampler, FixedSubset, build_test_loader, build_train_loader
from d2distill.classification.data.mixing import build_soft_targets
from d2distill.classification.data.replay import Replay
from d2distill.classification.data.resident import Residence
from d2distill.classification.data.splits import load_splits, load_test_set
from d2distill.classification.data.unreadable import UnreadableImages
from d2distill.classification.deployed import describe_student, shipped_methods
from d2distill.classification.evaluation import build_evaluator, report_classes
from d2distill.classification.inputs import resolve_inputs
from d2distill.classification.modeling import DistillModel, build_distiller
from d2distill.classification.networks import build_network, model_stats
from d2distill.classification.solver import PRECISIONS, build_lr_scheduler, build_optimizer
from d2distill.classification.speed import prepare_networks, replays_steps
from d2distill.classification.teacher_cache import cache_teachers
from d2distill.classification.testing import Testing, center_fit
from d2distill.common.config import CfgNode, resolve_device
from d2distill.common.engine.distributed import (
    run_on_main_process,
    synchronize_batch_norms,
    wrap_student,
)
from d2distill.common.engine.dot import DOT
from d2distill.common.engine.run_folder import prepare_run, start_logs
from d2distill.common.engine.seeding import seed_step
from d2distill.common.engine.task import Interruptible, Task
from d2distill.common.engine.trainer import Trainer
from d2distill.common.engine.weight_files import weights_digest
from d2distill.common.engine.weight_loading import load_weights
from d2distill.common.errors import CheckpointError, ConfigError, DivergedError
from d2distill.common.outputs import Progress

__all__ = ["build_trainer", "evaluate", "load_datasets", "train"]

logger = logging.getLogger("detectron2.d2distill")
_STATISTICS = [(node, key) for node in ("STUDENT", "TEACHER") for key in ("MEAN", "STD")]
#: Settings that may be others when a run is resumed. The teacher's file may move: its content is part of the run.
_MAY_CHANGE = (
    "CUDNN_BENCHMARK", "LOG_PERIOD", "LOGGERS", "REPORT.*", "MODEL.DEVICE", "MODEL.TEACHER.WEIGHTS",
    "DISTILL.CE_WEIGHT", "DISTILL.*.WEIGHT", "DISTILL.*.WARMUP", "SOLVER.EPOCHS", "SOLVER.BASE_LR",
    "SOLVER.LR_SCHEDULE", "SOLVER.STEPS", "SOLVER.GAMMA", "SOLVER.WARMUP_EPOCHS", "SOLVER.MOMENTUM", "SOLVER.NESTEROV",
    "SOLVER.DELTA", "SOLVER.WEIGHT_DECAY", "SOLVER.CLIP_GRAD_NORM", "SOLVER.CHECKPOINT_*", "SOLVER.COMPILE",
    "SOLVER.CUDA_GRAPH", "SOLVER.MEMORY_FORMAT", "DATALOADER.NUM_WORKERS", "DATALOADER.ON_ERROR",
    "DATALOADER.RESIDENT_GB", "TEST.*", "MODEL.TEACHER.CACHE", "MODEL.TEACHER.CACHE_GB",
)  # fmt: skip


def build_trainer(cfg: CfgNode, train_set: ImageDataset, test_set: ImageDataset) -> Trainer:
    """Networks, methods, optimizer, data and evaluation of a checked configuration with its MODEL.NUM_CLASSES set."""
    # The run's settings stay as they were given.
    given, cfg = cfg, resolve_inputs(cfg)
    if cfg.SOLVER.CLASS_WEIGHTS == "balanced":
        cfg.SOLVER.CLASS_WEIGHTS = _balanced_weights(train_set)
        weights = shortened((f"{weight:.3f}" for weight in cfg.SOLVER.CLASS_WEIGHTS), 20)
        logger.info(f"SOLVER.CLASS_WEIGHTS balanced: {weights}")
    solver, workers, fit = cfg.SOLVER, cfg.DATALOADER.NUM_WORKERS, center_fit(cfg)
    # The student is built first, so that its weights are the same whatever teacher and methods follow. All processes
    # build the same: not everything is sent to them from the main one.
    seed_step(cfg.SEED, 0, rank=0)
    student = build_network(cfg, "MODEL.STUDENT", cfg.MODEL.STUDENT, cfg.MODEL.NUM_CLASSES)
    labels = None if train_set.info.multi_label else train_set.labels
    model = build_distiller(cfg, student=student, num_samples=len(train_set), labels=labels)
    replay = Replay.of(cfg)
    sync_bn = cfg.MODEL.SYNC_BN and synchronize_batch_norms(model.student)
    drawn_alike = labels if cfg.DATALOADER.SAMPLER == "balanced" else None
    unreadable = UnreadableImages(cfg.OUTPUT_DIR) if cfg.DATALOADER.ON_ERROR == "skip" else None

    def build_sampler(start: int = 0) -> EpochBatchSampler:
        return EpochBatchSampler(
            len(train_set), solver.IMS_PER_BATCH, solver.EPOCHS, cfg.SEED, start, drawn_alike, replay
        )

    sampler = build_sampler()
    # First, so that a cached teacher is compiled for as many rows as it computes at a time.
    cache_teachers(cfg, model, train_set, steps=len(sampler))
    prepare_networks(model, cfg, steps=len(sampler))
    optimizer = build_optimizer(model, solver)
    epoch_length, augmentation = sampler.epoch_length, cfg.INPUT.AUGMENTATION or train_set.info.augmentation
    mixes = cfg.INPUT.MIXUP or cfg.INPUT.CUTMIX
    soften = build_soft_targets(cfg, cfg.MODEL.NUM_CLASSES)
    residence = Residence.of(cfg)
    testing = Testing(cfg, test_set, unreadable)

    def build_batches(start: int) -> Any:
        return build_train_loader(train_set, build_sampler(start), fit, augmentation, workers, unreadable, residence)

    def dot_backward(losses: dict[str, Tensor]) -> None:
        names = {f"loss_{name}" for name in model.distillers}
        task = {name: loss for name, loss in losses.items() if name not in names}
        optimizer.backward(task, {name: loss for name, loss in losses.items() if name in names})

    def split_batch(batch: dict[str, Tensor], step: int) -> list[tuple[dict[str, Any], float]]:
        # Each process takes the mean over its own samples; their average is the mean over the whole batch only
        # where all have the same number, so not in an epoch's last batch.
        weight = sampler.rank_loss_weight(step)
        if weight == 0 and sync_bn:
            # The sample it was given in place of none would count in the others' batch norms.
            batch = {name: part[:0] for name, part in batch.items()}
        if replay.epochs:
            batch = replay.repeat(batch, step, epoch_length, weight, soften)
        progress = Progress(step, step // epoch_length + 1, step / len(sampler))
        return [({**batch, "progress": progress}, weight)]

    def evaluate_student(network: nn.Module, interruptible: Interruptible) -> dict[str, float]:
        average = trainer.ema is not None and network is trainer.ema.network
        return testing.evaluate_student(network, model.student_norm, interruptible, report=not average)

    backward = dot_backward if isinstance(optimizer, DOT) else None
    teacher = None if model.teacher is None else weights_digest(model.teacher)
    teacher_results = testing.measure_teachers(model) if cfg.TEST.TEACHER else {}
    task = Task(
        model=model,
        # DOT averages its gradients over the processes itself.
        wrapped=model if backward else wrap_student(model),
        optimizer=optimizer,
        lr_scheduler=build_lr_scheduler(optimizer, solver, epoch_length),
        build_batches=build_batches,
        deployed_student=model.deployed_student,
        evaluate=evaluate_student,
        best_metric=testing.best_metric,
        max_iter=len(sampler),
        eval_period=cfg.TEST.EVAL_PERIOD * epoch_length,
        checkpoint_periods=[p for p in (solver.CHECKPOINT_PERIOD * epoch_length, solver.CHECKPOINT_STEPS) if p],
        may_change=_MAY_CHANGE,
        run_identity={
            "training samples": len(train_set),
            "the teacher's weights": teacher,
            # What was left open in the settings, and what is not: the run's, whatever a library says later.
            **{f"INPUT.{key}": cfg.INPUT[key] for key in ("SIZE", "RESIZE", "INTERPOLATION")},
            **{f"MODEL.{node}.PIXEL_{key}": cfg.MODEL[node][f"PIXEL_{key}"] for node, key in _STATISTICS},
        },
        epoch_length=epoch_length,
        precision=PRECISIONS[solver.AMP],
        clip_norm=solver.CLIP_GRAD_NORM,
        # Replayed mixing is seeded by the step that it repeats.
        prepare=None if replay.epochs else soften,
        split_batch=split_batch,
        backward=backward,
        graph_inputs=model.graph_inputs if replays_steps(cfg) else None,
        model_stats=lambda network: model_stats(network, fit.size),
        description=functools.cache(lambda: describe_student(cfg, train_set, test_set)),
        facts=lambda: {**teacher_results, **_teacher_stats(cfg, model), "per_class": testing.per_class},
        finite_outputs=lambda: model.finite,
        # Mixed images have no one class, and some methods deploy other logits than the student's.
        step_metrics=dict if mixes or shipped_methods(cfg) else lambda: model.step_metrics,
        images_per_step=len(train_set) / epoch_length,
        default_settings=get_cfg,
        report_parts=testing.worst,
    )
    trainer = Trainer(given, task)  # a name that evaluate_student knows
    return trainer


def _teacher_stats(cfg: CfgNode, model: DistillModel) -> dict[str, int]:
    """``teacher_parameters`` and ``teacher_flops``, of several teachers their sums."""
    if model.teacher is None or not cfg.REPORT.ENABLED:
        return {}
    teachers = model.teacher if isinstance(model.teacher, nn.ModuleList) else [model.teacher]
    stats = [model_stats(teacher, cfg.INPUT.SIZE) for teacher in teachers]
    return {f"teacher_{name}": sum(each[name] for each in stats) for name in ("parameters", "flops")}


def load_datasets(cfg: CfgNode) -> tuple[ImageDataset, ImageDataset]:
    """Training and test split of the configured data set; sets MODEL.NUM_CLASSES where it is 0."""
    if cfg.INPUT.AUGMENTATION:
        try:
            build_augmentation(cfg.INPUT.AUGMENTATION)
        except ValueError as error:
            raise ConfigError(f"INPUT.AUGMENTATION: {error}") from None
    train_set, test_set = load_splits(cfg)
    _take_classes(cfg, train_set)
    if cfg.DATASETS.TRAIN_SIZE > len(train_set):
        raise ConfigError(f"DATASETS.TRAIN_SIZE is {cfg.DATASETS.TRAIN_SIZE}, but there are {len(train_set)} samples")
    if cfg.DATASETS.TRAIN_SIZE:
        train_set = FixedSubset(train_set, cfg.DATASETS.TRAIN_SIZE)
    return train_set, test_set


def _balanced_weights(dataset: ImageDataset) -> list[float]:
    samples, counts = len(dataset), dataset.samples_per_class()
    if dataset.info.multi_label:
        return [(samples - count) / max(count, 1) for count in counts]
    # As scikit-learn's; a class without samples has no use for one.
    return [samples / (len(counts) * count) if count else 0.0 for count in counts]


def _take_classes(cfg: CfgNode, dataset: ImageDataset) -> None:
    if cfg.MODEL.NUM_CLASSES not in (0, dataset.num_classes):
        raise ConfigError(
            f"MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}, but data set {cfg.DATASETS.NAME} has "
            f"{dataset.num_classes} classes; leave it at 0 to take the data set's"
        )
    cfg.MODEL.NUM_CLASSES = dataset.num_classes


def train(cfg: CfgNode, resume: bool = False) -> dict[str, float]:
    """One process's part of a training run: ``tools/train_cls.py`` without its command line.

    Returns:
        ``top1, top5, test_loss, best_top1, best_top5`` on the main process; of a multi-label data set ``mAP, test_loss,
        best_mAP``.

    Raises:
        UserError, FileNotFoundError: something is missing or does not fit; nothing was written over.
    """
    with prepare_run(cfg, resume):
        for note in schedule_notes(cfg):
            logger.warning(note)
        train_set, test_set = load_datasets(cfg)
        if comm.is_main_process():
            for line in describe_dataset({"training": train_set, "test": test_set}):
                logger.info(line)
        trainer = build_trainer(cfg, train_set, test_set)
        results = trainer.run(resume)
        if results:
            logger.info(f"Results: {', '.join(f'{name} {value:.2f}' for name, value in results.items())}")
        return results


def evaluate(cfg: CfgNode) -> dict[str, float]:
    """Metrics of MODEL.STUDENT.WEIGHTS on the test split; empty on other ranks.

    If OUTPUT_DIR exists and can be written to, the confusion matrix is in its ``confusion_eval.csv``.
    """
    start_logs(None)
    weights = cfg.MODEL.STUDENT.WEIGHTS
    cfg = resolve_inputs(cfg)
    # The training images are not needed, and need not be there; nor are methods, but those that ship with the student.
    test_set = load_test_set(cfg)
    _take_classes(cfg, test_set)
    cfg.DISTILL.METHODS, cfg.MODEL.STUDENT.WEIGHTS, cfg.MODEL.TEACHER.WEIGHTS = shipped_methods(cfg), "", ""
    cfg.SOLVER.CLASS_WEIGHTS = []
    model = build_distiller(cfg).to(resolve_device(cfg))
    load_weights(model.deployed_student(), weights, "MODEL.STUDENT.WEIGHTS", cfg.MODEL.STUDENT.USE_EMA)
    unreadable = UnreadableImages() if cfg.DATALOADER.ON_ERROR == "skip" else None
    workers, evaluator = cfg.DATALOADER.NUM_WORKERS, build_evaluator(test_set.info)
    loader = build_test_loader(test_set, cfg.TEST.IMS_PER_BATCH, center_fit(cfg), workers, unreadable)
    try:
        results = inference_on_dataset(model, loader, evaluator)
    except DivergedError as error:
        raise CheckpointError(
            f"MODEL.STUDENT.WEIGHTS {weights}: {error.what} Its training diverged, or the file is damaged"
        ) from error
    if unreadable is not None:
        unreadable.summarize()
    confusion = Path(cfg.OUTPUT_DIR, "confusion_eval.csv") if cfg.OUTPUT_DIR else None
    run_on_main_process(lambda: report_classes(evaluator, test_set, confusion))
    return results
