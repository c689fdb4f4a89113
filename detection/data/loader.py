"""Data loaders of detection. Batches and augmentation are a function of (seed, step), so that runs resume exactly."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

# How many images after one that the mapper skips (returns None for) are tried before it is an error.
MAX_SKIPPED = 20


class MappedImages(Dataset):
    """Images processed by a mapper, by (position, index), or by index where nothing is random.

    Detectron2's MapDataset is not used: it replaces a skipped image by one that depends on the images seen before.

    Args:
        dicts: images in Detectron2's format.
        mapper: such as Detectron2's DatasetMapper; may draw from Python's, numpy's and torch's generators, which are
            seeded by (seed, position) meanwhile. For an image that it skips (returns None for) the next one is taken.
        seed: of the run.
    """

    def __init__(self, dicts: list[dict[str, Any]], mapper: Mapper, seed: int = 0) -> None:
        # Serialized into one buffer that workers share: reference counts would copy a list of objects into each.
        self.dicts = DatasetFromList(dicts, copy=False)
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        position, index = key if isinstance(key, tuple) else (0, key)
        with _seeded(self.seed, position):
            for skipped in range(MAX_SKIPPED + 1):
                image = self._map(self.dicts[(index + skipped) % len(self)])
                if image is not None:
                    return image
        raise DataError(
            f"the mapper skips {self.dicts[index].get('file_name', 'an image')} and the {MAX_SKIPPED} images after it"
        )

    def _map(self, record: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return self.mapper(record)
        except (OSError, SyntaxError, ValueError) as error:  # of image decoders, and Detectron2's for a wrong size
            raise DataError(
                f"cannot use image {record.get('file_name')}: {str(error) or type(error).__name__}. Restore the file, "
                "or remove the image from the annotations"
            ) from error


@contextmanager
def _seeded(seed: int, position: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generators by (seed, position), and restore them at the end."""
    # The spawn key keeps this stream apart from seed_step's, which is seeded by numbers like these.
    words = np.random.SeedSequence([seed, position], spawn_key=(2,)).generate_state(4)
    number = int(words[1]) << 32 | int(words[0])
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(number)
        np.random.seed(words)
        # torch.manual_seed would seed the GPUs' generators too, and nothing restores them.
        torch.default_generator.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def build_train_loader(
    cfg: CfgNode, dataset_dicts: list[dict[str, Any]], start: int = 0, mapper: Mapper | None = None
) -> DataLoader:
    """Endless batches of this process's share of SOLVER.IMS_PER_BATCH images, from step `start` on.

    A batch is a list of dicts as Detectron2's models take them: ``image`` (3, H, W) uint8 and ``instances``. Which
    images, and how they are augmented, depends on SEED and the step only: not on the number of workers and processes,
    nor on restarts.

    Args:
        dataset_dicts: as :func:`d2distill.detection.data.load_training_set` returns them.
        mapper: replaces Detectron2's DatasetMapper, see :class:`MappedImages`.

    Raises:
        ConfigError, DataError: as :func:`.build_batch_sampler`. Iterating raises a DataError for an image that cannot
            be read, or has another size than the annotations say.
    """
    return _loader(
        cfg,
        dataset_dicts,
        mapper or DatasetMapper(cfg, is_train=True),
        batch_sampler=build_batch_sampler(cfg, dataset_dicts, start),
    )


def build_test_loader(cfg: CfgNode, name: str) -> DataLoader:
    """Every image of a registered data set once, in order, divided among the processes, in batches of one.

    Raises:
        ConfigError, FileNotFoundError, DataError: as :func:`.load_test_set`, and while iterating as
            :func:`build_train_loader`.
    """
    dicts = load_test_set(cfg, name)
    return _loader(cfg, dicts, DatasetMapper(cfg, is_train=False), batch_size=1, sampler=InferenceSampler(len(dicts)))


def _loader(cfg: CfgNode, dicts: list[dict[str, Any]], mapper: Mapper, **sampling: Any) -> DataLoader:
    images = MappedImages(dicts, mapper, cfg.SEED)
    workers = cfg.DATALOADER.NUM_WORKERS
    return WorkerLoader(images, num_workers=workers, collate_fn=trivial_batch_collator, **sampling)
