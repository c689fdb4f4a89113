"""Training and evaluating a classifier, from a configuration to a run folder."""

import logging
from typing import Any

from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from torch import Tensor

from d2distill.classification.config import PRECISIONS, image_size
from d2distill.classification.data import ImageDataset, build_augmentation, build_dataset
from d2distill.classification.data.loader import EpochBatchSampler, Subset, build_test_loader, build_train_loader
from d2distill.classification.evaluation import AccuracyEvaluator
from d2distill.classification.modeling import build_distiller
from d2distill.classification.networks import build_network, model_cost, why_not_one_sample
from d2distill.classification.solver import build_lr_scheduler, build_optimizer
from d2distill.common.config import CfgNode, resolve_device
from d2distill.common.engine.distributed import broadcast_buffers, synchronize_batch_norms, wrap_student
from d2distill.common.engine.run import RunTrainer, prepare_run, start_logs
from d2distill.common.engine.trainer import seed_step
from d2distill.common.errors import CheckpointError, ConfigError, DivergedError

__all__ = ["ClassificationTrainer", "evaluate", "load_datasets", "train"]

logger = logging.getLogger("detectron2.d2distill")


class ClassificationTrainer(RunTrainer):
    """Epochs over a data set, with evaluation, logs, checkpoints and the student's own files.

    Args:
        cfg: a checked configuration whose MODEL.NUM_CLASSES is set.
        train_set, test_set: the two splits.

    Raises:
        ConfigError: a network or method that does not fit, or that cannot train on an epoch's last batch.
        CheckpointError: weights that are missing or of another network.
    """

    fixed = (
        "SEED",
        "SOLVER.IMS_PER_BATCH",
        "DATASETS.NAME",
        "DATASETS.TRAIN_SIZE",
        "MODEL.STUDENT.NAME",
        "MODEL.TEACHER.NAME",
        "DISTILL.METHODS",
        "SOLVER.OPTIMIZER",
        "SOLVER.AMP",
    )

    def __init__(self, cfg: CfgNode, train_set: ImageDataset, test_set: ImageDataset) -> None:
        solver, workers, size = cfg.SOLVER, cfg.DATALOADER.NUM_WORKERS, image_size(cfg)
        # The student is built first, so that its weights are the same whatever teacher and methods follow. All
        # processes build the same: not everything is sent to them from the main one.
        seed_step(cfg.SEED, 0, rank=0)
        student = build_network(cfg, "MODEL.STUDENT", cfg.MODEL.STUDENT, cfg.MODEL.NUM_CLASSES)
        self.distill_model = build_distiller(cfg, student=student, num_samples=len(train_set))
        self.distill_model.set_labels(train_set.labels.to(resolve_device(cfg)))

        def sampler(start: int) -> EpochBatchSampler:
            return EpochBatchSampler(len(train_set), solver.IMS_PER_BATCH, solver.EPOCHS, cfg.SEED, start)

        self.sampler = sampler(0)
        self._check_smallest_batch(cfg)
        self._shares_statistics = cfg.MODEL.SYNC_BN and synchronize_batch_norms(self.distill_model.student)
        augmentation = cfg.INPUT.AUGMENTATION or train_set.info.augmentation
        optimizer = build_optimizer(self.distill_model, solver)
        # An optimiser with a backward of its own averages the gradients over the processes itself.
        self._own_backward = getattr(optimizer, "backward", None)
        self.epoch_length = self.sampler.epoch_length
        self.test_loader = build_test_loader(test_set, cfg.TEST.IMS_PER_BATCH, size, workers)
        super().__init__(
            cfg,
            self.distill_model if self._own_backward else wrap_student(self.distill_model),
            self.distill_model,
            optimizer,
            lambda start: build_train_loader(train_set, sampler(start), size, augmentation, workers),
            build_lr_scheduler(optimizer, solver, self.epoch_length),
            max_iter=len(self.sampler),
            test_period=cfg.TEST.EVAL_PERIOD * self.epoch_length,
            select="top1",
            facts={"training samples": len(train_set)},
            precision=PRECISIONS[solver.AMP],
            clip=solver.CLIP_GRAD_NORM,
        )

    def _check_smallest_batch(self, cfg: CfgNode) -> None:
        """Refuse a batch size under which the first epoch would end in an error.

        Most networks train on a single sample; a trial shows whether this one does.
        """
        whole, samples = cfg.MODEL.SYNC_BN, self.sampler.num_samples
        reason = self.sampler.smallest(whole=whole) == 1 and why_not_one_sample(self.distill_model, image_size(cfg))
        if reason:
            fitting = self.sampler.without_single_samples(whole)
            raise ConfigError(
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} gives a process a single sample in the last batch of "
                f"an epoch of {samples}, and over one a batch norm here has no variance ({reason}); "
                + (f"SOLVER.IMS_PER_BATCH {fitting} works" if fitting else "train on more samples")
            )

    def compute_losses(self, batch: Any) -> dict[str, Tensor]:
        # Each process takes the mean over its own samples; their average is the mean over the whole batch only
        # where all have the same number, so not in an epoch's last batch.
        share = self.sampler.share(self.iter)
        if share == 0 and self._shares_statistics:
            # The sample it was given in place of none would count in the others' batch norms.
            batch = {name: part[:0] for name, part in batch.items()}
        losses = self.model(batch, self.iter // self.epoch_length + 1)
        return losses if share == 1 else {name: share * value for name, value in losses.items()}

    def backward(self, losses: dict[str, Tensor]) -> None:
        if self._own_backward is None:
            super().backward(losses)
        else:
            task, *distill = losses.values()
            self._own_backward(task, sum(distill))

    def test(self) -> dict[str, float]:
        """Top-1 and top-5 accuracy of the student on the test split, in percent; empty beside the main process."""
        if comm.get_world_size() > 1:
            # Running statistics differ between the processes after a step; the main one's are those that are saved.
            broadcast_buffers(self.distill_model.student)
        return inference_on_dataset(self.distill_model, self.watched(self.test_loader), AccuracyEvaluator())

    def student_state(self) -> dict[str, Tensor]:
        return self.distill_model.student.state_dict()

    def cost(self) -> dict[str, float]:
        return model_cost(self.distill_model.student, image_size(self.cfg))

    def run(self, start: int = 0) -> dict[str, float]:
        """Train from step `start` to the end; ``top1, top5, best_top1, best_top5`` on the main process."""
        solver = self.cfg.SOLVER
        periods = [solver.CHECKPOINT_PERIOD * self.epoch_length, solver.CHECKPOINT_STEPS]
        return super().run(start, [period for period in periods if period])


def load_datasets(cfg: CfgNode) -> tuple[ImageDataset, ImageDataset]:
    """Training and test split of the configured data set; sets MODEL.NUM_CLASSES where it is 0.

    Raises:
        FileNotFoundError, DataError: the data set is missing or incomplete.
        ConfigError: MODEL.NUM_CLASSES is not that of the data, or an unknown augmentation.
    """
    if cfg.INPUT.AUGMENTATION:
        try:
            build_augmentation(cfg.INPUT.AUGMENTATION)
        except ValueError as error:
            raise ConfigError(f"INPUT.AUGMENTATION: {error}") from None
    train_set, test_set = (build_dataset(cfg.DATASETS.NAME, cfg.DATASETS.ROOT, split) for split in ("train", "val"))
    _take_classes(cfg, train_set)
    if cfg.DATASETS.TRAIN_SIZE > len(train_set):
        raise ConfigError(f"DATASETS.TRAIN_SIZE is {cfg.DATASETS.TRAIN_SIZE}, but there are {len(train_set)} samples")
    if cfg.DATASETS.TRAIN_SIZE:
        train_set = Subset(train_set, cfg.DATASETS.TRAIN_SIZE)
    return train_set, test_set


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
        ``top1, top5, best_top1, best_top5`` on the main process.

    Raises:
        UserError, FileNotFoundError: something is missing or does not fit; nothing was written over.
    """
    prepare_run(cfg, resume)
    # Before the data, whose warnings belong in the log.
    start_logs(cfg.OUTPUT_DIR)
    train_set, test_set = load_datasets(cfg)
    trainer = ClassificationTrainer(cfg, train_set, test_set)
    start = trainer.resume() if resume else 0
    results = trainer.run(start)
    if results:
        logger.info(f"Results: {', '.join(f'{name} {value:.2f}' for name, value in results.items())}")
    return results


def evaluate(cfg: CfgNode) -> dict[str, float]:
    """Accuracy of MODEL.STUDENT.WEIGHTS on the test split; empty on other ranks.

    Raises:
        UserError, FileNotFoundError: something is missing or does not fit.
    """
    # The training images are not needed, and need not be there.
    test_set = build_dataset(cfg.DATASETS.NAME, cfg.DATASETS.ROOT, "val")
    _take_classes(cfg, test_set)
    cfg.DISTILL.METHODS = []
    model = build_distiller(cfg)
    loader = build_test_loader(test_set, cfg.TEST.IMS_PER_BATCH, image_size(cfg), cfg.DATALOADER.NUM_WORKERS)
    try:
        return inference_on_dataset(model.to(resolve_device(cfg)), loader, AccuracyEvaluator())
    except DivergedError as error:
        raise CheckpointError(
            f"MODEL.STUDENT.WEIGHTS {cfg.MODEL.STUDENT.WEIGHTS}: {error.what} Its training diverged, or the file is "
            "damaged"
        ) from error
