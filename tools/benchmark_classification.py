"""The training step of a classifier: as everybody writes it, as the trainer does it, and the least that it takes."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.transforms.functional import to_pil_image

from d2distill.classification.config import load_cfg
from d2distill.classification.data.datasets import ArrayDataset, ImageDataset, dataset_info
from d2distill.classification.inputs import resolve_inputs
from d2distill.classification.modeling import DistillModel, build_distiller
from d2distill.classification.trainer import build_trainer, load_datasets
from d2distill.common.config import CfgNode, resolve_device
from d2distill.common.engine.seeding import seed_step
from d2distill.common.engine.trainer import Trainer
from d2distill.common.errors import ConfigError, DataError
from d2distill.common.modules import captured_extras
from d2distill.common.outputs import Batch, Outputs, Progress
from d2distill.tools.benchmark_losses import use_usual_losses
from d2distill.tools.benchmark_runs import Runner, TrainerSteps

#: Images of a synthetic data set: so many bytes, that is 21 845 of CIFAR's size and 445 of ImageNet's.
SYNTHETIC_BYTES = 2**26
CLASSES = 1000  # of synthetic images, where the data set's info leaves them open
#: A run that is longer than the benchmark, whose steps alone are timed, and stays finite with random weights.
LONG = ["SOLVER.EPOCHS", "100000", "SOLVER.STEPS", "[]", "SOLVER.CHECKPOINT_PERIOD", "100000", "TEST.EVAL_PERIOD"]
LONG += ["100000", "TEST.TEACHER", "False", "REPORT.ENABLED", "False", "LOGGERS", "[]", "SOLVER.BASE_LR", "0.001"]
LONG += ["SOLVER.CHECKPOINT_STEPS", "0"]
TRANSFORMS = {
    "crop_flip": lambda size: [T.RandomCrop(size, padding=size // 8), T.RandomHorizontalFlip()],
    "crop": lambda size: [T.RandomCrop(size, padding=size // 8)],
    "rotate_flip": lambda size: [T.RandomRotation(20), T.RandomHorizontalFlip()],
    "resized_crop_flip": lambda size: [T.RandomResizedCrop(size), T.RandomHorizontalFlip()],
    "none": lambda size: [],
}


def prepare(
    config: str, opts: list[str], synthetic: bool, folder: str
) -> tuple[CfgNode, tuple[ImageDataset, ImageDataset], list[str]]:
    """The configuration, its training and test set, and what is to be said of them.

    Where the data set is not on the machine they are random images of its shape, and networks have random weights.
    """
    cfg = load_cfg(config, [*LONG, *opts, "OUTPUT_DIR", folder])
    if not synthetic:
        try:
            return cfg, load_datasets(cfg), []
        except (FileNotFoundError, DataError):
            pass
    cfg.MODEL.TEACHER.WEIGHTS = cfg.MODEL.STUDENT.WEIGHTS = ""
    datasets = synthetic_datasets(cfg)
    images, classes = "x".join(map(str, datasets[0].images.shape)), datasets[0].num_classes
    return cfg, datasets, [f"random uint8 images {images} of {classes} classes, networks of random weights"]


def synthetic_datasets(cfg: CfgNode) -> tuple[ArrayDataset, ArrayDataset]:
    """Noise of the size and with as many classes as `cfg` has, and of that the first images for a test; sets
    MODEL.NUM_CLASSES."""
    info = dataset_info(cfg.DATASETS.NAME)
    size, generator = cfg.INPUT.SIZE or info.image_size, torch.Generator().manual_seed(0)
    classes = info.num_classes or cfg.MODEL.NUM_CLASSES or CLASSES
    n = cfg.DATASETS.TRAIN_SIZE or SYNTHETIC_BYTES // (3 * size * size)
    cfg.MODEL.NUM_CLASSES, cfg.DATASETS.TRAIN_SIZE = classes, 0
    images = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    labels, names = torch.arange(n) % classes, [str(number) for number in range(classes)]
    return tuple(ArrayDataset(info, images[:size], labels[:size], names) for size in (n, min(n, 64)))


class PILDataset(Dataset):
    """A data set as torchvision's are: a PIL image, transformed, its class and its position."""

    def __init__(self, dataset: ImageDataset, transform: T.Compose) -> None:
        self.dataset, self.transform = dataset, transform
        self.arrays = None
        if isinstance(dataset, ArrayDataset):
            self.arrays = dataset.images.permute(0, 2, 3, 1).contiguous().numpy()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if self.arrays is not None:
            image, label = Image.fromarray(np.asarray(self.arrays[index])), int(self.dataset.labels[index])
        else:
            image, label = self.dataset.load(index)
            image = to_pil_image(image) if isinstance(image, Tensor) else image
        return self.transform(image), label, index


def plain_batches(cfg: CfgNode, dataset: ImageDataset) -> Iterator[list[Tensor]]:
    """Normalized images, classes and positions from torchvision's transforms on PIL images, epoch after epoch."""
    cfg = resolve_inputs(cfg)
    name, size = cfg.INPUT.AUGMENTATION or dataset.info.augmentation, cfg.INPUT.SIZE
    if name not in TRANSFORMS:
        raise ConfigError(f"INPUT.AUGMENTATION {name}: the plain loop has {', '.join(TRANSFORMS)}")
    mean, std = ([value / 255 for value in cfg.MODEL.STUDENT[f"PIXEL_{key}"]] for key in ("MEAN", "STD"))
    transform = T.Compose([*TRANSFORMS[name](size), T.ToTensor(), T.Normalize(mean, std)])
    loader = DataLoader(
        PILDataset(dataset, transform),
        cfg.SOLVER.IMS_PER_BATCH,
        shuffle=True,
        num_workers=workers(cfg),
        drop_last=True,
        pin_memory=resolve_device(cfg).type == "cuda",
    )
    while True:
        yield from loader


def workers(cfg: CfgNode) -> int:
    """Of loaders: at most one per core, as the trainer's."""
    return min(cfg.DATALOADER.NUM_WORKERS, len(os.sched_getaffinity(0)))


def losses_of(model: DistillModel, images: Tensor, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
    """Losses of normalized images from the model's parts, and nothing else."""
    needs = {need for method in model.distillers.values() for need in method.student_needs}
    with captured_extras(model.student, needs) as extras:
        student = model.student.outputs(images)
    student.extras.update(extras)
    losses = {"loss_ce": model.ce_weight * F.cross_entropy(student.logits, batch.target, model.class_weights)}
    for name, method in model.distillers.items():
        term = method(student, method.pick_teacher(teacher), batch)
        losses[f"loss_{name}"] = method.weight(batch.progress) * term
    return losses


class PlainLoop:
    """The loop that everybody writes: eager fp32, the teacher under no_grad, a look at the losses in each step.

    Of the trainer's settings it knows IMS_PER_BATCH, BASE_LR, MOMENTUM, WEIGHT_DECAY, NUM_WORKERS and AUGMENTATION.
    """

    def __init__(self, cfg: CfgNode, dataset: ImageDataset) -> None:
        cfg = resolve_inputs(cfg)
        seed_step(cfg.SEED, 0, rank=0)
        self.model = build_distiller(cfg, num_samples=len(dataset), labels=dataset.labels).train()
        if isinstance(self.model.teacher, nn.ModuleList):
            raise ConfigError("MODEL.TEACHER.NAME: the plain loop has one teacher")
        self.device = resolve_device(cfg)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        solver = cfg.SOLVER
        self.optimizer = torch.optim.SGD(parameters, solver.BASE_LR, solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY)
        self.batches = plain_batches(cfg, dataset)

    def losses(self, images: Tensor, label: Tensor, index: Tensor) -> dict[str, Tensor]:
        teacher = None
        if self.model.teacher is not None:
            with torch.no_grad():
                teacher = self.model.teacher.outputs(images)
        return losses_of(self.model, images, teacher, Batch(label, index=index, progress=Progress(epoch=1)))

    def step(self) -> None:
        losses = self.losses(*(part.to(self.device) for part in next(self.batches)))
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()
        for loss in losses.values():
            loss.item()


def plain(config: str, opts: list[str], synthetic: bool, folder: str) -> Runner:
    cfg, (dataset, _), notes = prepare(config, opts, synthetic, folder)
    # For the whole process, which is the plain loop's own.
    usual = use_usual_losses() & {name.lower() for name in cfg.DISTILL.METHODS}
    notes += [f"{name}: its loss as it is usually written" for name in sorted(usual)]
    loop = PlainLoop(cfg, dataset)
    return Runner(loop.step, cfg.SOLVER.IMS_PER_BATCH, loop.device.type, _lead(cfg), notes=notes)


def _lead(cfg: CfgNode) -> int:
    # On a CPU the loader's part of a step is small, and steps are long.
    return 2 * workers(cfg) if resolve_device(cfg).type == "cuda" else 0


def trainer_for(config: str, opts: list[str], synthetic: bool, folder: str) -> tuple[CfgNode, Trainer, list[str]]:
    """The trainer as configured, on the data of :func:`prepare`."""
    cfg, datasets, notes = prepare(config, opts, synthetic, folder)
    return cfg, build_trainer(cfg, *datasets), notes


def ours(**arguments: Any) -> Runner:
    cfg, trainer, notes = trainer_for(**arguments)
    return TrainerSteps(trainer).runner(cfg.SOLVER.IMS_PER_BATCH, _lead(cfg), notes)


class BareStep:
    """Forward, backward, update of the trainer's student and methods on one batch that is on the device.

    Args:
        live: run the teacher as well; else its outputs are known.
    """

    def __init__(self, trainer: Trainer, live: bool) -> None:
        self.trainer, self.model = trainer, trainer.task.model.train()
        batch = next(iter(trainer.task.build_batches(0)))
        self.raw = batch["image"].to(trainer.device)
        self.images = self.model.student_norm(self.raw)
        target, index = (batch[name].to(trainer.device) for name in ("label", "index"))
        self.batch = Batch(target, index=index, progress=Progress(epoch=1))
        self.known = None if live else self.teacher()

    def teacher(self) -> Outputs | None:
        with self.autocast():
            return None if self.model.teacher_source is None else self.model.teacher_source(self.raw, self.batch)

    def autocast(self) -> torch.autocast:
        precision = self.trainer.task.precision
        return torch.autocast(self.trainer.device.type, precision, enabled=precision is not None)

    def step(self) -> None:
        trainer = self.trainer
        teacher = self.teacher() if self.known is None else self.known
        with self.autocast():
            losses = losses_of(self.model, self.images, teacher, self.batch)
        trainer.optimizer.zero_grad()
        if trainer.task.backward is not None:
            trainer.task.backward(losses)
        else:
            trainer.scaler.scale(sum(losses.values())).backward()
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()


def compute(live: bool = True, **arguments: Any) -> Runner:
    cfg, trainer, notes = trainer_for(**arguments)
    return Runner(BareStep(trainer, live).step, cfg.SOLVER.IMS_PER_BATCH, trainer.device.type, notes=notes)


def limit(**arguments: Any) -> Runner:
    return compute(live=False, **arguments)


def plain_data(**arguments: Any) -> Runner:
    """The plain loop's images, on the device."""
    cfg, (dataset, _), notes = prepare(**arguments)
    batches, device = plain_batches(cfg, dataset), resolve_device(cfg)
    step = lambda: next(batches)[0].to(device)  # noqa: E731
    return Runner(step, cfg.SOLVER.IMS_PER_BATCH, device.type, 2 * workers(cfg), notes=notes)


def ours_data(**arguments: Any) -> Runner:
    """The trainer's images, on the device and normalized, as the plain loop's are."""
    cfg, trainer, notes = trainer_for(**arguments)
    batches, normalize = iter(trainer.task.build_batches(0)), trainer.task.model.student_norm
    step = lambda: normalize(next(batches)["image"])  # noqa: E731
    return Runner(step, cfg.SOLVER.IMS_PER_BATCH, trainer.device.type, 2 * workers(cfg), notes=notes)
