"""Data loaders whose workers neither die of a signal to the job nor outlive their process, and say what is wrong."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from d2distill.common.errors import UserError

__all__ = ["WorkerLoader"]

#: A scheduler, and Ctrl-C, signal every process of a job: they are the main one's to answer.
_SIGNALS = {signal.SIGTERM, signal.SIGINT}


class WorkerLoader(DataLoader):
    """torch's DataLoader with workers that leave SIGTERM and SIGINT to the main process.

    On SIGTERM that one finishes its step, for which it needs its workers.

    Iterating raises a :class:`UserError` of the data set as it is, also that of a worker: torch would make one of its
    own from the text of a traceback.

    Args:
        dataset: a map-style data set.
        num_workers: at most; not more are started than there are cores.
        collate_fn: makes a batch of a list of samples.
        options: torch's own, without ``worker_init_fn`` and ``generator``.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        num_workers: int,
        collate_fn: Callable[[list], Any] = default_collate,
        **options: Any,
    ) -> None:
        super().__init__(
            _ErrorsAsSamples(dataset),
            num_workers=min(num_workers, len(os.sched_getaffinity(0))),
            worker_init_fn=_ignore_signals,
            collate_fn=_BatchOrError(collate_fn),
            # A generator of its own: the loader draws a seed for its workers, which no result depends on.
            generator=torch.Generator(),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        # Workers inherit the mask, so that a signal that comes before they ignore it does not end them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            return _raise_errors(super().__iter__())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _ErrorsAsSamples(Dataset):
    """A data set that hands out its errors for the user in place of samples: so they pass between processes."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except UserError as error:
            return error


class _BatchOrError:
    """A collate function for samples among which there may be errors."""

    def __init__(self, collate: Callable[[list], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list) -> Any:
        error = next((sample for sample in samples if isinstance(sample, UserError)), None)
        return self.collate(samples) if error is None else error


def _raise_errors(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        # The error's traceback keeps this frame, and with it the workers, which are to end now.
        batch = batches = None


def _ignore_signals(worker: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


@atexit.register
def _end_workers() -> None:
    # At exit multiprocessing sends SIGTERM to the workers that an error left behind, and waits for them.
    # torch's own handler would take their end for a failure.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
