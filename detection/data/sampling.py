"""Which images form a batch: Detectron2's samplers, in the same order for any number of processes and first step."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from d2distill.common.building import building
from d2distill.common.errors import ConfigError

__all__ = ["TrainBatchSampler", "build_batch_sampler"]


@dataclass
class TrainBatchSampler:
    """Endless batches of (position, index), starting at any step: this process's share of each global batch.

    The global batches are the same for any number of processes; a process takes every `world_size`-th sample of one. A
    position counts all samples of the run and is never repeated. Skipping the first steps reads no image.

    Args:
        sampler: one of Detectron2's for training, with a seed.
        batch_size: over all processes.
        groups: 0 or 1 for each image, and a batch has images of one group; None: batches in the sampler's order.
        start: the first step (batch) to give.
    """

    sampler: TrainingSampler
    batch_size: int
    groups: list[int] | None = None
    start: int = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step, batch in enumerate(islice(self._global_batches(), self.start, None), self.start):
            own = range(comm.get_rank(), self.batch_size, comm.get_world_size())
            yield [(step * self.batch_size + slot, batch[slot]) for slot in own]

    def _global_batches(self) -> Iterator[list[int]]:
        buckets: tuple[list[int], list[int]] = ([], [])
        # A private method, because Detectron2's samplers give only a process's share of the indices publicly; grouping
        # each share by itself would make batches that depend on the number of processes.
        for index in self.sampler._infinite_indices():
            bucket = buckets[self.groups[index] if self.groups else 0]
            bucket.append(index)
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()


def build_batch_sampler(cfg: CfgNode, dataset_dicts: list[dict[str, Any]], start: int = 0) -> TrainBatchSampler:
    """Batches of SOLVER.IMS_PER_BATCH images, grouped into wide and tall ones by DATALOADER.ASPECT_RATIO_GROUPING.

    Raises:
        ConfigError: a sampler that is not supported, or a batch that the processes cannot share evenly.
    """
    if cfg.SOLVER.IMS_PER_BATCH % comm.get_world_size():
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, but must be a multiple of the number of processes, "
            f"{comm.get_world_size()}"
        )
    loader, size = cfg.DATALOADER, len(dataset_dicts)
    with building("DATALOADER", cfg):
        if loader.SAMPLER_TRAIN == "TrainingSampler":
            sampler = TrainingSampler(size, seed=cfg.SEED)
        elif loader.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
            factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
                dataset_dicts, loader.REPEAT_THRESHOLD, sqrt=loader.REPEAT_SQRT
            )
            sampler = RepeatFactorTrainingSampler(factors, seed=cfg.SEED)
        elif loader.SAMPLER_TRAIN == "RandomSubsetTrainingSampler":
            sampler = RandomSubsetTrainingSampler(
                size, cfg.DATALOADER.RANDOM_SUBSET_RATIO, seed_shuffle=cfg.SEED, seed_subset=cfg.SEED
            )
        else:
            # Such as WeightedTrainingSampler, which needs a weight for each data set.
            raise ConfigError(
                f"DATALOADER.SAMPLER_TRAIN is {loader.SAMPLER_TRAIN}, but must be TrainingSampler, "
                "RepeatFactorTrainingSampler or RandomSubsetTrainingSampler"
            )
    groups = [int(d["width"] <= d["height"]) for d in dataset_dicts] if loader.ASPECT_RATIO_GROUPING else None
    return TrainBatchSampler(sampler, cfg.SOLVER.IMS_PER_BATCH, groups, start)
