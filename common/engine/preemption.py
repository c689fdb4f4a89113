"""Graceful preemption: record SIGTERM and Ctrl-C, and stop at the next step boundary."""

import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from detectron2.utils import comm

from d2distill.common.engine.interrupts import interrupt
from d2distill.common.errors import UserError

logger = logging.getLogger("detectron2.d2distill")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """Whether the scheduler, or the user by Ctrl-C, asked this job to stop.

    Attributes:
        requested: the number of the signal; 0 if none came.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Record the signals from now on, where Python allows handlers: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # Of a command in the background the shell has Ctrl-C ignored.
                if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._record)

    def remove(self) -> None:
        """Restore the handlers from before."""
        for number, handler in self._previous.items():
            # A command line that was asked to stop ends now: one more Ctrl-C is no news.
            ends = self.requested and handler is interrupt
            signal.signal(number, signal.SIG_IGN if ends else handler)
        self._previous = {}

    def requested_on_any_rank(self) -> int:
        """The signal that asked any process of the job to stop, 0 if none did. All call it; no GPU waits for it."""
        return max(comm.all_gather(self.requested))

    def _record(self, number: int, _: Any) -> None:
        self.requested = self.requested or number


def stop(number: int, what: str) -> NoReturn:
    """Exit because of the signal `number`, with the code of shells, 128 + `number`, and log what that means."""
    logger.warning(f"{signal.Signals(number).name}: {what}")
    raise SystemExit(128 + number)


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
        if number := max(asked):
            stop(number, "stopped in an evaluation; `--resume` starts with it")
        for error in filter(None, errors):
            raise error
