"""Data loaders whose workers neither die of a preemption nor outlive their process."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

__all__ = ["WorkerLoader"]


class WorkerLoader(DataLoader):
    """torch's DataLoader with workers that leave SIGTERM to the main process.

    A scheduler signals every process of a job. The main one then finishes its step, for which it needs its workers.

    Args:
        dataset: a map-style data set.
        num_workers: at most; not more are started than there are cores.
        options: torch's own, without ``worker_init_fn`` and ``generator``.
    """

    def __init__(self, dataset: Dataset, *, num_workers: int, **options: Any) -> None:
        super().__init__(
            dataset,
            num_workers=min(num_workers, len(os.sched_getaffinity(0))),
            worker_init_fn=_ignore_sigterm,
            # A generator of its own: the loader draws a seed for its workers, which no result depends on.
            generator=torch.Generator(),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        # Workers inherit the mask, so that a signal that comes before they ignore it does not end them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_sigterm(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@atexit.register
def _end_workers() -> None:
    # At exit multiprocessing sends SIGTERM to the workers that an error left behind, and waits for them.
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
