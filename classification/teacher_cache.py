"""MODEL.TEACHER.CACHE: which of a training's teachers are remembered, of which images, and filling the files ahead."""

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from detectron2.utils import comm
from torch import Tensor, nn
from torch.utils.data import Dataset

from d2distill.classification.config import teacher_nodes
from d2distill.classification.data import Augmentation, ImageDataset
from d2distill.classification.data.augment import AugmentedDataset, build_augmentation
from d2distill.classification.data.datasets import ImageSelection
from d2distill.classification.data.loader import EpochBatchSampler, build_train_loader
from d2distill.classification.data.mixing import build_soft_targets
from d2distill.classification.data.replay import Replay
from d2distill.classification.data.unreadable import SkippingLoader, UnreadableImages
from d2distill.classification.modeling import DistillModel
from d2distill.classification.solver import PRECISIONS
from d2distill.classification.speed import networks_to_compile
from d2distill.classification.testing import center_fit
from d2distill.common.cached_teacher import CACHED_PARTS, CachedTeacher, TeacherMemory
from d2distill.common.config import CfgNode
from d2distill.common.engine.loading import WorkerLoader
from d2distill.common.engine.weight_files import weights_digest
from d2distill.common.errors import ConfigError
from d2distill.common.outputs import Batch
from d2distill.common.teachers import TeacherEnsemble, TeacherSource

__all__ = ["cache_teachers", "cached_sources", "fill_cache"]

logger = logging.getLogger("detectron2.d2distill")
_DTYPES = {"fp32": None, "fp16": torch.float16}


def cache_teachers(cfg: CfgNode, model: DistillModel, train_set: ImageDataset, steps: int) -> None:
    """Let the model's teachers remember, as MODEL.TEACHER.CACHE and INPUT.REPLAY_EPOCHS say; the log says what is done.

    Args:
        cfg: nothing of its inputs is left open.
        steps: of the training, which decide whether its teacher is compiled.
    """
    replay, source, folder = Replay.of(cfg), model.teacher_source, cfg.MODEL.TEACHER.CACHE
    if replay.epochs:
        logger.info(
            f"INPUT.REPLAY_EPOCHS {replay.epochs}: the images of {replay.epochs} epochs repeat over the whole run, "
            f"{'mixed and in the same order' if replay.mixes else 'in an order of their own in each epoch'}; without "
            "it, each epoch has new ones, and another student comes out"
        )
    if not folder or source is None:
        return
    recipe = build_augmentation(cfg.INPUT.AUGMENTATION or train_set.info.augmentation)
    variants = replay.epochs or recipe.variants(cfg.INPUT.SIZE)
    images = train_set.content_digest()
    if reason := _never_twice(cfg, recipe, train_set, variants, images):
        logger.warning(f"MODEL.TEACHER.CACHE is not used, the teacher runs in each step: {reason}")
        return
    teachers = list(model.teacher) if isinstance(model.teacher, nn.ModuleList) else [model.teacher]
    several = isinstance(source, TeacherEnsemble)
    sources = source.sources if several else [source]
    device = next(model.parameters()).device
    precision = PRECISIONS[cfg.SOLVER.AMP]
    blank = torch.zeros(1, 3, cfg.INPUT.SIZE, cfg.INPUT.SIZE, device=device)
    made = _images_identity(cfg, recipe, images)
    compiled = "teacher" in networks_to_compile(model, cfg, steps)
    for number, (node, network) in enumerate(zip(teacher_nodes(cfg), teachers, strict=True)):
        key = f"MODEL.TEACHER {number}" if several else "MODEL.TEACHER"
        others = sorted({*sources[number].extras, *(sources[number].needs - {*CACHED_PARTS})})
        if others:
            logger.warning(
                f"MODEL.TEACHER.CACHE is not used for {key}, which runs in each step: a method asks it for "
                f"{', '.join(others)}, and only {', '.join(CACHED_PARTS)} are kept"
            )
        elif sources[number].needs:
            statistics = {"mean": list(node.PIXEL_MEAN), "std": list(node.PIXEL_STD)}
            # A graph of other parts may round otherwise.
            graph = {"compiled for": sorted(sources[number].needs) if compiled else []}
            graph |= {"memory format": cfg.SOLVER.MEMORY_FORMAT}
            memory = TeacherMemory(
                folder=Path(folder),
                name=node.NAME,
                identity={
                    "teacher": {"name": node.NAME, **_network_identity(network), **statistics, **graph},
                    "images": made,
                },
                samples=len(train_set),
                variants=variants,
                max_bytes=int(cfg.MODEL.TEACHER.CACHE_GB * 1e9),
                logits_dtype=_DTYPES[cfg.MODEL.TEACHER.CACHE_DTYPE],
                top_k=cfg.MODEL.TEACHER.CACHE_TOP_K,
                precision=precision,
            )
            with torch.no_grad(), torch.autocast(device.type, precision, enabled=precision is not None):
                example = network.outputs(blank)
            sources[number] = CachedTeacher(sources[number], example, memory, device)
    if not several:
        (model.teacher_source,) = sources


def cached_sources(source: TeacherSource | None) -> list[CachedTeacher]:
    """Those among a model's teachers that remember."""
    sources = source.sources if isinstance(source, TeacherEnsemble) else [source]
    return [each for each in sources if isinstance(each, CachedTeacher)]


def _never_twice(
    cfg: CfgNode, recipe: Augmentation, train_set: ImageDataset, variants: int | None, images: str | None
) -> str:
    """Why no image can be looked up; empty where it can."""
    replay, way_out = Replay.of(cfg), "INPUT.REPLAY_EPOCHS K repeats the images of K epochs, which can be kept"
    if replay.mixes and not replay.epochs:
        return f"INPUT.MIXUP and CUTMIX make no image twice; {way_out}"
    if replay.mixes and (cfg.DATALOADER.SAMPLER != "shuffle" or cfg.DATALOADER.ON_ERROR != "raise"):
        return "mixed images are numbered only with DATALOADER.SAMPLER shuffle and ON_ERROR raise"
    if variants is None:
        return f"the augmentation {type(recipe).__name__} makes no image twice; {way_out}"
    if images is None:
        while isinstance(train_set, ImageSelection):
            train_set = train_set.dataset
        return f"{type(train_set).__name__} does not say which images it has; give it a content_digest()"
    return ""


def _network_identity(network: nn.Module) -> dict[str, str]:
    # Strides, activations and the like are in no state dict.
    structure = hashlib.sha256(repr(network).encode()).hexdigest()
    return {"class": type(network).__name__, "structure": structure, "weights": weights_digest(network)}


def _images_identity(cfg: CfgNode, recipe: Augmentation, images: str) -> dict[str, Any]:
    inputs, replay = cfg.INPUT, Replay.of(cfg)
    # Of an own recipe the code is all that is known.
    classes = [kind for kind in type(recipe).__mro__ if issubclass(kind, Augmentation)]
    code = hashlib.sha256("".join(map(_source_of, classes)).encode()).hexdigest()
    identity = {
        "data set": cfg.DATASETS.NAME,
        "images": images,
        "size": [inputs.SIZE, inputs.RESIZE, inputs.INTERPOLATION],
        "augmentation": [type(recipe).__name__, repr(vars(recipe)), code],
        "libraries": {"torchvision": torchvision.__version__, "pillow": PIL.__version__},
        "replayed epochs": replay.epochs,
    }
    if replay.epochs and replay.mixes:
        # They decide with which others an image is mixed.
        mixing = {"mixup": inputs.MIXUP, "cutmix": inputs.CUTMIX, "seed": cfg.SEED}
        identity["mixing"] = mixing | {"batch": cfg.SOLVER.IMS_PER_BATCH, "processes": comm.get_world_size()}
    return identity


def _source_of(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed in at a prompt
        return f"{kind!r} {id(kind)}"


def fill_cache(cfg: CfgNode, model: DistillModel, train_set: ImageDataset, done: Callable[[int], object]) -> None:
    """Compute the rows that are not there yet. It can be stopped at any time, and called again.

    Args:
        cfg: nothing of its inputs is left open.
        model: its teachers remember (:func:`cache_teachers`).
        done: called with the number of images that were just done.
    """
    sources = cached_sources(model.teacher_source)
    for batch in _batches(cfg, train_set, sources, done):
        for source in sources:
            rows = batch["index"] < source.samples
            source(batch["image"][rows], Batch(host_index=batch["index"][rows], key=batch["key"][rows]))
        done(len(batch["index"]))


def _batches(
    cfg: CfgNode, train_set: ImageDataset, sources: list[CachedTeacher], done: Callable[[int], object]
) -> Iterator[dict[str, Tensor]]:
    replay, workers, fit = Replay.of(cfg), cfg.DATALOADER.NUM_WORKERS, center_fit(cfg)
    augmentation = cfg.INPUT.AUGMENTATION or train_set.info.augmentation
    if replay.mixes:
        # Mixed images are those of the training's batches.
        sampler = EpochBatchSampler(len(train_set), cfg.SOLVER.IMS_PER_BATCH, replay.epochs, cfg.SEED, replay=replay)
        soften, length = build_soft_targets(cfg, cfg.MODEL.NUM_CLASSES), sampler.epoch_length
        for step, batch in enumerate(build_train_loader(train_set, sampler, fit, augmentation, workers)):
            yield replay.repeat(batch, step, length, 1.0, soften)
        return
    samples = _Numbered(AugmentedDataset(train_set, fit, replay.augmentation_seed(cfg.SEED), augmentation), replay)
    options = {"batch_sampler": _Missing(sources, done), "num_workers": workers}
    options["pin_memory"] = torch.cuda.is_available()
    skip = cfg.DATALOADER.ON_ERROR == "skip"
    yield from SkippingLoader(samples, UnreadableImages(), **options) if skip else WorkerLoader(samples, **options)


class _Missing:
    """Batches of the numbers of rows that a source lacks; calls `done` with how many are there."""

    def __init__(self, sources: list[CachedTeacher], done: Callable[[int], object]) -> None:
        self.sources, self.done = sources, done

    def __iter__(self) -> Iterator[list[int]]:
        variants = self.sources[0].memory.variants
        rows = variants * max(source.samples for source in self.sources)
        # As many as are read at a time without taking much memory.
        block = max(2**26 // max(source.row_bytes for source in self.sources), 1)
        waiting, size = [], self.sources[0].chunk
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            lacking = [source.missing(start, min(stop, source.samples * variants)) for source in self.sources]
            found = np.unique(np.concatenate(lacking))
            self.done(stop - start - len(found))
            waiting += found.tolist()
            while len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]
        if waiting:
            yield waiting


class _Numbered(Dataset):
    """Training images by the number of their row."""

    def __init__(self, samples: AugmentedDataset, replay: Replay) -> None:
        self.samples, self.replay = samples, replay
        self.variants = replay.epochs or samples.recipe.variants(samples.fit.size)
        try:
            replay.epochs or samples.recipe.numbered(0, samples.fit.size)
        except NotImplementedError as error:
            raise ConfigError(
                f"INPUT.AUGMENTATION: {error} (Augmentation.numbered): its files are filled by the training alone"
            ) from error

    def __len__(self) -> int:
        return len(self.samples) * self.variants

    def __getitem__(self, number: int) -> dict[str, Tensor | int]:
        index, key = divmod(number, self.variants)
        if self.replay.epochs:
            return {**self.samples[key + 1, index], "key": key}
        image, _ = self.samples.dataset.load(index)
        recipe, size = self.samples.recipe, self.samples.fit.size
        # Recipes with countable variants get images of the size that the networks see.
        image = self.samples.fit(image) if recipe.fits_first else image
        return {"image": recipe.apply(image, recipe.numbered(key, size), size), "index": index, "key": key}
