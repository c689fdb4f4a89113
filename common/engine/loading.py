"""DataLoader whose workers ignore SIGTERM and SIGINT of the job and re-raise user errors unchanged."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from d2distill.common.errors import UserError

#: A scheduler, and Ctrl-C, signal every process of a job; only the main process acts on them.
_SIGNALS = {signal.SIGTERM, signal.SIGINT}


class WorkerLoader(DataLoader):
    """torch's DataLoader with workers that leave SIGTERM and SIGINT to the main process, which still needs them.

    Iterating raises a :class:`UserError` of the data set unchanged, also from a worker; torch would put the text of its
    traceback into a new error.

    Args:
        dataset: a map-style data set.
        num_workers: at most one per core is started.
        collate_fn: makes a batch from a list of samples.
        options: torch's own, without ``worker_init_fn`` and ``generator``.
    """

    def __init__(
        self, dataset: Dataset, *, num_workers: int, collate_fn: Callable[[list], Any] = default_collate, **options: Any
    ) -> None:
        super().__init__(
            _BatchOrError(dataset, collate_fn),
            num_workers=min(num_workers, len(os.sched_getaffinity(0))),
            worker_init_fn=_answer_parent_only,
            collate_fn=_unchanged,
            # torch draws a seed for the workers, on which no result depends: not from the global generator.
            generator=torch.Generator(),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        # Workers inherit the mask: a signal cannot end them before they are set up.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            return _raise_errors(super().__iter__())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _BatchOrError(Dataset):
    """Gives whole batches, and in place of one its user error, so that it passes between processes."""

    def __init__(self, dataset: Dataset, collate: Callable[[list], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list) -> Any:
        try:
            return self.collate([self.dataset[key] for key in keys])
        except UserError as error:
            return error


def _unchanged(batch: Any) -> Any:
    return batch


def _raise_errors(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        # An error's traceback keeps this frame alive: without these references the workers end now.
        batch = batches = None


def _answer_parent_only(worker: int) -> None:
    """End on SIGTERM from the process of the loader, as multiprocessing sends it at exit; discard all other signals.

    Signals stay blocked in the worker, as inherited, so only this thread sees them, and who sent them.
    """
    parent = os.getppid()

    def wait() -> None:
        while (info := signal.sigwaitinfo(_SIGNALS)).si_pid != parent or info.si_signo != signal.SIGTERM:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
