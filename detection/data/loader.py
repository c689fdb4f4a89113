"""Batches whose images and augmentation are a function of (seed, step), read by Detectron2's mapper."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import InferenceSampler
from torch.utils.data import DataLoader, Dataset

from d2distill.common.engine.loading import WorkerLoader
from d2distill.common.errors import DataError

from .catalog import load_test_set
from .sampling import build_batch_sampler

__all__ = ["MappedImages", "build_test_loader", "build_train_loader"]

Mapper = Callable[[dict[str, Any]], dict[str, Any] | None]

# Images after one that the mapper leaves out, before it is an error.
MAX_NEIGHBOURS = 20


class MappedImages(Dataset):
    """Images as a mapper gives them, by (position, index), or by index where nothing is random.

    Args:
        dicts: images in Detectron2's format.
        mapper: as Detectron2's DatasetMapper; may draw from Python's, numpy's and torch's generators.
        seed: of the run.

    Raises:
        DataError: by a file that cannot be used, or an image that the mapper leaves out with those after it.
    """

    def __init__(self, dicts: list[dict[str, Any]], mapper: Mapper, seed: int = 0) -> None:
        # One buffer of bytes, which workers share: a list of objects would be copied into each as it is counted.
        self.dicts = DatasetFromList(dicts, copy=False)
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        position, index = key if isinstance(key, tuple) else (0, key)
        with _Seeded(self.seed, position):
            for neighbour in range(MAX_NEIGHBOURS + 1):
                image = self._map(self.dicts[(index + neighbour) % len(self)])
                if image is not None:
                    return image
        raise DataError(
            f"the mapper leaves out {self.dicts[index].get('file_name', 'an image')} and the {MAX_NEIGHBOURS} images "
            "after it in the data set"
        )

    def _map(self, record: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return self.mapper(record)
        except (OSError, SyntaxError, ValueError) as error:  # what decoders raise, and Detectron2 for a wrong size
            raise DataError(
                f"cannot use image {record.get('file_name')}: {str(error) or type(error).__name__}. Restore the file, "
                "or take the image out of the annotations"
            ) from error


class _Seeded:
    """Seeds Python's, numpy's and torch's generators by (seed, position); restores them at the end."""

    def __init__(self, seed: int, position: int) -> None:
        # The spawn key keeps this stream apart from the step's, which is seeded by numbers like these.
        self.words = np.random.SeedSequence([seed, position], spawn_key=(2,)).generate_state(4)

    def __enter__(self) -> None:
        self.before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        low, high = self.words[:2].tolist()
        random.seed(high << 32 | low)
        np.random.seed(self.words)
        # torch.manual_seed would seed the GPUs' generators too, which nothing restores.
        torch.default_generator.manual_seed(high << 32 | low)

    def __exit__(self, *error: object) -> None:
        python, numpy, cpu = self.before
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def build_train_loader(
    cfg: CfgNode, dataset_dicts: list[dict[str, Any]], start: int = 0, mapper: Mapper | None = None
) -> DataLoader:
    """Endless batches of this process's SOLVER.IMS_PER_BATCH / (number of processes) images, from step `start` on.

    An image is a dict as Detectron2's models take it: ``image`` (3, H, W) uint8 and ``instances`` with boxes in
    pixels. Which images, and how they are augmented, depends on SEED and the step alone: not on the number of workers
    and processes, nor on restarts. The global generators are as before after each image.

    Args:
        dataset_dicts: as of :func:`d2distill.detection.data.load_training_set`.
        mapper: instead of Detectron2's DatasetMapper. For an image that it gives None for, the next one in
            `dataset_dicts` is taken.

    Raises:
        ConfigError, DataError: as :func:`.build_batch_sampler`. Iterating raises a DataError for
            an image that cannot be read, or has another size than its data set says.
    """
    images = MappedImages(dataset_dicts, mapper or DatasetMapper(cfg, is_train=True), cfg.SEED)
    batches = build_batch_sampler(cfg, dataset_dicts, start)
    return WorkerLoader(
        images,
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
    )


def build_test_loader(cfg: CfgNode, name: str) -> DataLoader:
    """Every image of a registered set once, in order, shared out over the processes, in batches of one.

    Raises:
        ConfigError, FileNotFoundError, DataError: as :func:`.load_test_set`, and while iterating as
            :func:`build_train_loader`.
    """
    dicts = load_test_set(cfg, name)
    return WorkerLoader(
        MappedImages(dicts, DatasetMapper(cfg, is_train=False), cfg.SEED),
        batch_size=1,
        sampler=InferenceSampler(len(dicts)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
    )
