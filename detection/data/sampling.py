"""Which images make a batch: Detectron2's samplers, in one order for any number of processes and any first step."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import Sampler

from d2distill.common.errors import ConfigError, DataError

__all__ = ["TrainBatchSampler", "build_batch_sampler", "build_sampler"]

_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")


class TrainBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (position, index) from any step on: this process's share of each global batch.

    The global batches are the same for any number of processes: every `world_size`-th sample of one is a process's.
    A position counts all samples of the run, and is not repeated. No image is read to pass over the first steps.

    Args:
        sampler: one of Detectron2's for training, with a seed.
        batch_size: over all processes.
        groups: 0 or 1 for each image; a batch has images of one group. None: as they come.
        start: the first step (batch) to give.
    """

    def __init__(
        self, sampler: TrainingSampler, batch_size: int, groups: list[int] | None = None, start: int = 0
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.groups = groups
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step, batch in enumerate(islice(self.global_batches(), self.start, None), self.start):
            own = range(comm.get_rank(), self.batch_size, comm.get_world_size())
            yield [(step * self.batch_size + slot, batch[slot]) for slot in own]

    def global_batches(self) -> Iterator[list[int]]:
        """All batches from the first step on, as a single process would have them."""
        # Detectron2's samplers keep the stream of all processes private; iterating over one gives a process's part.
        indices = self.sampler._infinite_indices()
        if self.groups is None:
            while True:
                yield list(islice(indices, self.batch_size))
        groups, size = self.groups, self.batch_size
        buckets: tuple[list[int], list[int]] = ([], [])
        for index in indices:
            bucket = buckets[groups[index]]
            bucket.append(index)
            if len(bucket) == size:
                yield bucket[:]
                bucket.clear()


def build_sampler(cfg: CfgNode, dataset_dicts: list[dict[str, Any]]) -> TrainingSampler | RepeatFactorTrainingSampler:
    """The sampler of DATALOADER.SAMPLER_TRAIN, seeded by SEED.

    Raises:
        ConfigError: another sampler than Detectron2's three that need no second look at the data sets, or a subset
            without an image.
    """
    name, size = cfg.DATALOADER.SAMPLER_TRAIN, len(dataset_dicts)
    if name not in _SAMPLERS:
        raise ConfigError(f"DATALOADER.SAMPLER_TRAIN is {name}, but must be one of {', '.join(_SAMPLERS)}")
    if name == "TrainingSampler":
        return TrainingSampler(size, seed=cfg.SEED)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset_dicts, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(factors, seed=cfg.SEED)
    ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
    if not 0 < ratio <= 1 or int(size * ratio) < 1:
        raise ConfigError(
            f"DATALOADER.RANDOM_SUBSET_RATIO is {ratio}, of {size} images: it must be at most 1 and leave an image"
        )
    return RandomSubsetTrainingSampler(size, ratio, seed_shuffle=cfg.SEED, seed_subset=cfg.SEED)


def build_batch_sampler(cfg: CfgNode, dataset_dicts: list[dict[str, Any]], start: int = 0) -> TrainBatchSampler:
    """Batches of SOLVER.IMS_PER_BATCH images, wide and tall ones apart with DATALOADER.ASPECT_RATIO_GROUPING.

    Raises:
        ConfigError: a sampler as :func:`build_sampler` says, or a batch that the processes cannot share evenly.
        DataError: images are to be grouped, but one has no width and height.
    """
    if cfg.SOLVER.IMS_PER_BATCH % comm.get_world_size():
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, but must be a multiple of the number of processes, "
            f"{comm.get_world_size()}"
        )
    groups = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        try:
            groups = [int(record["width"] <= record["height"]) for record in dataset_dicts]
        except KeyError as error:
            lacking = next(record for record in dataset_dicts if error.args[0] not in record)
            raise DataError(
                f"{lacking.get('file_name', 'an image')} has no {error.args[0]} in its data set, which "
                "DATALOADER.ASPECT_RATIO_GROUPING needs: add it, or set that to False"
            ) from None
    return TrainBatchSampler(build_sampler(cfg, dataset_dicts), cfg.SOLVER.IMS_PER_BATCH, groups, start)
