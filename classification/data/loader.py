"""Batches whose order and augmentation are a function of (seed, epoch, index) alone."""

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import BatchSampler, DataLoader, Sampler

from d2distill.classification.data.augment import AugmentedDataset, CenterFit
from d2distill.classification.data.datasets import ImageDataset, ImageSelection
from d2distill.classification.data.replay import Replay
from d2distill.classification.data.resident import Residence, ResidentTestLoader, ResidentTrainLoader
from d2distill.classification.data.unreadable import SkippingLoader, UnreadableImages
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
        labels: (num_samples,) classes that are to be drawn alike: each sample of an epoch is then drawn with
            replacement, first its class, then one of it.
        replay: says as of which epoch samples are augmented, and ordered.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        epochs: int,
        seed: int,
        start: int = 0,
        labels: torch.Tensor | None = None,
        replay: Replay | None = None,
    ) -> None:
        self.num_samples, self.batch_size, self.epochs = num_samples, batch_size, epochs
        self.seed, self.start, self.labels, self.replay = seed, start, labels, replay or Replay()
        self.epoch_length = -(-num_samples // batch_size)

    def __len__(self) -> int:
        return self.epochs * self.epoch_length - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, indices in self.index_batches():
            yield [(epoch, index) for index in indices.tolist()]

    def index_batches(self) -> Iterator[tuple[int, np.ndarray]]:
        """The same batches, each as an epoch and an array of indices."""
        first_epoch, first_batch = divmod(self.start, self.epoch_length)
        for epoch in range(first_epoch + 1, self.epochs + 1):
            # The spawn key keeps this stream apart from the augmentation's, which is seeded by the same numbers.
            drawn_as = self.replay.epoch(epoch)
            ordered_as = drawn_as if self.replay.mixes else epoch
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, ordered_as], spawn_key=(0,)))
            order = rng.permutation(self.num_samples) if self.labels is None else self._draw_classes_alike(rng)
            for batch in range(first_batch, self.epoch_length):
                indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
                own = indices[comm.get_rank() :: comm.get_world_size()]
                yield drawn_as, own if len(own) else indices[:1]
            first_batch = 0

    def _draw_classes_alike(self, rng: np.random.Generator) -> np.ndarray:
        labels = self.labels.numpy()
        _, first, counts = np.unique(np.sort(labels), return_index=True, return_counts=True)
        drawn = rng.integers(len(counts), size=self.num_samples)
        return np.argsort(labels, kind="stable")[first[drawn] + rng.integers(counts[drawn])]

    def rank_loss_weight(self, step: int) -> float:
        """Factor for this rank's mean loss, with which the average over the ranks is the mean over the whole batch."""
        first = step % self.epoch_length * self.batch_size
        size = min(self.batch_size, self.num_samples - first)
        own = len(range(comm.get_rank(), size, comm.get_world_size()))
        return own * comm.get_world_size() / size


class FixedSubset(ImageSelection):
    """The first `size` samples of a fixed shuffle of a data set, with all its classes."""

    def __init__(self, dataset: ImageDataset, size: int, seed: int = 0) -> None:
        super().__init__(dataset, np.random.default_rng(seed).permutation(len(dataset))[:size])


def build_train_loader(
    dataset: ImageDataset,
    batch_sampler: EpochBatchSampler,
    size: int | CenterFit,
    augmentation: str,
    num_workers: int,
    unreadable: UnreadableImages | None = None,
    residence: Residence | None = None,
) -> DataLoader | ResidentTrainLoader:
    """Batches ``image`` (N, 3, S, S) uint8, ``label`` (N,), ``index`` (N,) in the order of `batch_sampler`.

    Where the augmentation has a number of variants, ``key`` (N,) is which of them each image is. Images that cannot be
    read are a DataError; with `unreadable` they are put there, and the next one that can be read takes their place.
    With `residence` images that fit there are kept there, and ``image`` and ``label`` are on its device.
    """
    seed = batch_sampler.replay.augmentation_seed(batch_sampler.seed)
    samples = AugmentedDataset(dataset, size, seed, augmentation)
    if residence and residence.takes(samples, "training"):
        plain = AugmentedDataset(dataset, size)
        read = partial(_build_loader, plain, num_workers, unreadable, True)
        return ResidentTrainLoader(samples, batch_sampler, residence.device, read)
    return _build_loader(samples, num_workers, unreadable, True, batch_sampler)


def build_test_loader(
    dataset: ImageDataset,
    batch_size: int,
    size: int | CenterFit,
    num_workers: int,
    unreadable: UnreadableImages | None = None,
    residence: Residence | None = None,
) -> DataLoader | ResidentTestLoader:
    """Every sample once, in order, split over the ranks; with `unreadable` without those that cannot be read.

    With `residence` as :func:`build_train_loader`.
    """
    samples, batch_sampler = (
        AugmentedDataset(dataset, size),
        BatchSampler(InferenceSampler(len(dataset)), batch_size, False),
    )
    loader = _build_loader(samples, num_workers, unreadable, False, batch_sampler)
    if residence and residence.takes(samples, "test"):
        return ResidentTestLoader(samples, batch_size, residence.device, loader)
    return loader


def _build_loader(
    samples: AugmentedDataset,
    num_workers: int,
    unreadable: UnreadableImages | None,
    replace: bool,
    batch_sampler: Iterable[list],
) -> DataLoader:
    options = {"batch_sampler": batch_sampler, "num_workers": num_workers, "pin_memory": torch.cuda.is_available()}
    if unreadable is None:
        return WorkerLoader(samples, **options)
    return SkippingLoader(samples, unreadable, replace, **options)
