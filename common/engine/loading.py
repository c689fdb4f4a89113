"""DataLoader whose workers ignore SIGTERM and SIGINT of the job and re-raise user errors unchanged."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from d2distill.common.errors import DataError, UserError

#: A scheduler, and Ctrl-C, signal every process of a job; only the main process acts on them.
_SIGNALS = {signal.SIGTERM, signal.SIGINT}


class WorkerLoader(DataLoader):
    """torch's DataLoader with workers that leave SIGTERM and SIGINT to the main process, which still needs them.

    Iterating raises a :class:`UserError` of the data set unchanged, also from a worker; torch would put the text of its
    traceback into a new error. That a worker was killed is a :class:`DataError`, raised where the main process is then.

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
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self.num_workers:
            _explain_killed_workers()
        return _raise_errors(batches, bool(self.num_workers))


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


def _raise_errors(batches: Iterator[Any], of_workers: bool) -> Iterator[Any]:
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (RuntimeError, ConnectionError, EOFError) as error:
        killed = _worker_killed(error) if of_workers else None
        if killed is None:
            raise
        raise killed from error
    finally:
        # An error's traceback keeps this frame alive: without these references the workers end now.
        batch = batches = None


_torch_handler: Callable[..., None] | None = None


def _explain_killed_workers() -> None:
    """Let torch's handler of SIGCHLD, which raises an error when a worker has been killed, raise one for the user."""
    global _torch_handler
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "").startswith("torch."):  # which installs it once, in the main thread
        _torch_handler = handler
    elif handler is not signal.SIG_DFL:
        return
    if _torch_handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, _explain)


def _explain(*arguments: Any) -> None:
    try:
        _torch_handler(*arguments)
    except RuntimeError as error:
        raise (_worker_killed(error) or error) from error


def _worker_killed(error: Exception) -> UserError | None:
    """The error for the user, where one of torch's says that a worker has ended, or broken off in a batch."""
    if isinstance(error, UserError):
        return None
    if isinstance(error.__cause__, UserError):  # which was raised while torch waited for a batch
        return error.__cause__
    text = str(error).splitlines()[0].rstrip(" .") if str(error) else type(error).__name__
    of_torch = text.startswith("DataLoader worker (pid")
    if not of_torch and (isinstance(error, RuntimeError) or text.startswith("Caught ")):  # an error of the data set
        return None
    if threading.current_thread() is threading.main_thread():
        # torch's handler would raise again whenever another child ends.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return DataError(
        f"a worker of the data loader has ended ({text}): mostly memory ran out and the system killed it; lower "
        "DATALOADER.NUM_WORKERS, or give the job more memory (after a bus error, more of /dev/shm)"
    )


def _answer_parent_only(worker: int) -> None:
    """End on SIGTERM from the process of the loader, as multiprocessing sends it at exit, and when that has ended.

    All other signals are discarded. They stay blocked in the worker, as inherited, so only this thread sees them, and
    who sent them.
    """
    # Which started it itself, and is gone when it has another parent, or by a server, whose pipe then closes.
    parent, starter = multiprocessing.parent_process(), os.getppid()

    def wait() -> None:
        while os.getppid() == starter and parent.is_alive():
            info = signal.sigtimedwait(_SIGNALS, 1)
            if info is not None and (info.si_pid, info.si_signo) == (parent.pid, signal.SIGTERM):
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
