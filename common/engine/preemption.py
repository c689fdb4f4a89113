"""SIGTERM: noted when it comes, acted upon where a run can stop and go on; and evaluations that are left half done."""

import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from detectron2.utils import comm

from d2distill.common.errors import UserError

__all__ = ["EvaluationInterrupted", "InterruptibleLoader", "Preemption"]

logger = logging.getLogger("detectron2.d2distill")


class EvaluationInterrupted(Exception):
    """An evaluation was left, by all processes.

    Attributes:
        error: what went wrong in one of them; None where the job is to stop.
    """

    def __init__(self, error: UserError | None = None) -> None:
        super().__init__("SIGTERM" if error is None else str(error))
        self.error = error


class Preemption:
    """Whether the scheduler asked this job to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def install(self) -> None:
        """Note SIGTERM from now on."""
        # Python allows handlers in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._request)

    def remove(self) -> None:
        """Leave SIGTERM to whom it was before."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def requested_on_any_rank(self) -> bool:
        """Whether any process of the job was asked. All call it."""
        if comm.get_world_size() == 1:
            return self.requested
        # On the CPU group, so that no GPU waits for it.
        flag = torch.tensor([int(self.requested)])
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=comm._get_global_gloo_group())
        return bool(flag)


class InterruptibleLoader:
    """Batches of an evaluation, which ends early where the job is to stop, for a scheduler does not wait for it, or
    where one of them cannot be had.

    Args:
        batches: with a length.
        preemption: what is watched.

    Raises:
        EvaluationInterrupted: in all processes, after their last batch, where one was asked to stop or had an error.
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
