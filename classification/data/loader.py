"""Batches whose order and augmentation are a function of (seed, epoch, index) alone."""

from collections.abc import Iterator

import numpy as np
import torch
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Sampler

from d2distill.classification.data.augment import AugmentedDataset, CenterFit
from d2distill.classification.data.datasets import ImageDataset
from d2distill.common.engine.loading import WorkerLoader

__all__ = ["EpochBatchSampler", "FixedSubset", "build_test_loader", "build_train_loader"]


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) from any step on, without going through the steps before it.

    Each epoch is a permutation drawn from (seed, epoch), cut into batches; the last one of an epoch may be smaller.
    Each rank takes every `world_size`-th sample of the batch that a single process would have. A rank that gets none
    of an epoch's last few takes the first of them, with a loss weight of 0.

    Args:
        batch_size: over all ranks.
        start: the first step (batch) to give, counted over all epochs.
    """

    def __init__(self, num_samples: int, batch_size: int, epochs: int, seed: int, start: int = 0) -> None:
        self.num_samples, self.batch_size, self.epochs = num_samples, batch_size, epochs
        self.seed, self.start = seed, start
        self.epoch_length = -(-num_samples // batch_size)

    def __len__(self) -> int:
        return self.epochs * self.epoch_length - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_epoch, first_batch = divmod(self.start, self.epoch_length)
        for epoch in range(first_epoch + 1, self.epochs + 1):
            # The spawn key keeps this stream apart from the augmentation's, which is seeded by the same numbers.
            stream = np.random.SeedSequence([self.seed, epoch], spawn_key=(0,))
            order = np.random.default_rng(stream).permutation(self.num_samples)
            for batch in range(first_batch, self.epoch_length):
                indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
                own = indices[comm.get_rank() :: comm.get_world_size()]
                yield [(epoch, int(index)) for index in (own if len(own) else indices[:1])]
            first_batch = 0

    def rank_loss_weight(self, step: int) -> float:
        """Factor for this rank's mean loss, with which the average over the ranks is the mean over the whole batch."""
        first = step % self.epoch_length * self.batch_size
        size = min(self.batch_size, self.num_samples - first)
        own = len(range(comm.get_rank(), size, comm.get_world_size()))
        return own * comm.get_world_size() / size


class FixedSubset(ImageDataset):
    """The first `size` samples of a fixed shuffle of a data set, with all its classes."""

    def __init__(self, dataset: ImageDataset, size: int, seed: int = 0) -> None:
        self.positions = np.random.default_rng(seed).permutation(len(dataset))[:size]
        super().__init__(dataset.info, dataset.labels[self.positions], dataset.classes)
        self.dataset = dataset

    def _samples(self) -> list:
        return [self.positions]

    def load(self, index: int):
        return self.dataset.load(int(self.positions[index]))


def build_train_loader(
    dataset: ImageDataset, batch_sampler: EpochBatchSampler, size: int | CenterFit, augmentation: str, num_workers: int
) -> DataLoader:
    """Batches ``image`` (N, 3, S, S) uint8, ``label`` (N,), ``index`` (N,) in the order of `batch_sampler`."""
    samples = AugmentedDataset(dataset, size, batch_sampler.seed, augmentation)
    pin = torch.cuda.is_available()
    return WorkerLoader(samples, batch_sampler=batch_sampler, num_workers=num_workers, pin_memory=pin)


def build_test_loader(dataset: ImageDataset, batch_size: int, size: int | CenterFit, num_workers: int) -> DataLoader:
    """Every sample once, in order, split over the ranks."""
    return WorkerLoader(
        AugmentedDataset(dataset, size),
        batch_size=batch_size,
        sampler=InferenceSampler(len(dataset)),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
