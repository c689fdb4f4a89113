"""Graceful preemption: record SIGTERM and stop at the next step boundary."""

import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm

from d2distill.common.errors import UserError

__all__ = ["EvaluationInterrupted", "InterruptibleLoader", "Preemption"]

logger = logging.getLogger("detectron2.d2distill")


class EvaluationInterrupted(Exception):
    """All processes left an evaluation.

    Attributes:
        error: of one of them; None if the job was asked to stop.
    """

    def __init__(self, error: UserError | None = None) -> None:
        super().__init__("SIGTERM" if error is None else str(error))
        self.error = error


class Preemption:
    """Whether the scheduler asked this job to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None
        self._group: dist.ProcessGroup | None = None

    def install(self) -> None:
        """Record SIGTERM from now on. All processes call it."""
        if comm.get_world_size() > 1:
            # On the CPU, so that no GPU waits for it.
            self._group = dist.new_group(backend="gloo")
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._request)

    def remove(self) -> None:
        """Restore the handler from before."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def requested_on_any_rank(self) -> bool:
        """Whether any process of the job was asked to stop. All call it."""
        if comm.get_world_size() == 1:
            return self.requested
        flag = torch.tensor([int(self.requested)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)


class InterruptibleLoader:
    """Batches of an evaluation that ends early when the job is asked to stop, or when a batch raises a user error.

    A scheduler does not wait for a whole evaluation.

    Args:
        batches: with a length.
        preemption: checked before every batch.

    Raises:
        EvaluationInterrupted: in all processes, after their last batch, if one was asked to stop or had an error.
    """

    def __init__(self, batches: Iterable[Any], preemption: Preemption) -> None:
        self.batches = batches
        self.preemption = preemption

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
        errors = [error for error in errors if error is not None]
        if any(asked) or errors:
            raise EvaluationInterrupted(None if any(asked) else errors[0])
