"""Graceful preemption: record SIGTERM and stop at the next step boundary."""

import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from detectron2.utils import comm

from d2distill.common.errors import UserError

logger = logging.getLogger("detectron2.d2distill")
#: 128 + SIGTERM: what a shell reports for a process that ended on that signal.
PREEMPTED = 143


class Preemption:
    """Whether the scheduler asked this job to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def install(self) -> None:
        """Record SIGTERM from now on, where Python allows handlers: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, lambda number, frame: setattr(self, "requested", True))

    def remove(self) -> None:
        """Restore the handler from before."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def requested_on_any_rank(self) -> bool:
        """Whether any process of the job was asked to stop. All call it; no GPU waits for it."""
        return any(comm.all_gather(self.requested))


class InterruptibleLoader:
    """Batches of an evaluation that ends early when the job is asked to stop: a scheduler does not wait for all of it.

    The resumed run starts with this evaluation, since a checkpoint is saved before.

    Args:
        batches: with a length.
        preemption: checked before every batch.

    Raises:
        SystemExit: in all processes, after their last batch, if one was asked to stop.
        UserError: in all processes, if a batch of one raises it.
    """

    def __init__(self, batches: Iterable[Any], preemption: Preemption) -> None:
        self.batches, self.preemption = batches, preemption

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        error = None
        try:
            for batch in self.batches:
                if self.preemption.requested:
                    break
                yield batch
        except UserError as own:
            error = own
        asked, errors = zip(*comm.all_gather((self.preemption.requested, error)), strict=True)
        if any(asked):
            logger.warning("SIGTERM in an evaluation; `--resume` starts with it")
            raise SystemExit(PREEMPTED)
        for error in filter(None, errors):
            raise error
