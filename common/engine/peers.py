"""The other ranks of a job: whether they run the same, and which of them has died."""

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from multiprocessing import connection
from typing import Any

import torch.distributed as dist
from detectron2.utils import comm

from d2distill.common.engine.cli import user_message
from d2distill.common.errors import ConfigError, UserError

#: Where a node has its files is its own affair.
_MAY_DIFFER = ("DATASETS.ROOT", "IMPORTS", "*WEIGHTS")
_ENDED = "d2distill_ended_rank"


class RankEndedError(UserError):
    """Another process of the job has ended, without which this one cannot continue."""


class Peers:
    """The processes of a job, watched from one of them.

    Args:
        store: of the job.
        pids: of the other ranks; None on other nodes. The system is asked about those of this node.
    """

    def __init__(self, store: dist.Store, pids: Mapping[int, int | None]) -> None:
        self._store, self._handles = store, {}
        self.elsewhere = [rank for rank, pid in pids.items() if pid is None]
        for rank, pid in pids.items():
            with suppress(AttributeError, TypeError, OSError):  # another node's, or a system without such handles
                self._handles[os.pidfd_open(pid)] = rank

    def close(self) -> None:
        for handle in self._handles:
            os.close(handle)

    @functools.cached_property
    def ended(self) -> list[int]:
        """The rank that has ended, asked when something has failed: a connection breaks before its process ends.

        None within 3 seconds, if it is of another node where nobody is left who could say it.
        """
        ready = []
        try:
            for _ in range(15):
                if ready := connection.wait([*self._handles], 0.2):
                    self._store.set(_ENDED, str(self._handles[ready[0]]))  # for the other nodes
                    break
                if self._store.check([_ENDED]):
                    return [int(self._store.get(_ENDED))]
        except dist.DistError:
            return [self._handles[ready[0]]] if ready else [0]  # which hosts the store, or whose launcher does
        return [self._handles[handle] for handle in ready[:1]]


_peers: Peers | None = None


def watch_peers(peers: Peers | None) -> None:
    """Let :func:`naming_ended_rank` ask these from now on."""
    global _peers
    if _peers is not None:
        _peers.close()
    _peers = peers


def _suspects(error: BaseException) -> list[int]:
    """The rank whose end has caused an error; several where it is one of them; empty for an error of this process."""
    if _peers is None or user_message(error) is not None:
        return []
    of_connection = isinstance(error, dist.DistError) or "gloo" in str(error)
    return _peers.ended or (_peers.elsewhere if of_connection else [])


@contextmanager
def naming_ended_rank() -> Iterator[None]:
    """Replace an error of the block by a :class:`RankEndedError` where another rank's end has caused it."""
    try:
        yield
    except Exception as error:
        ranks = _suspects(error)
        if not ranks:
            raise
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"one of the ranks {', '.join(map(str, ranks))}"
        raise RankEndedError(
            f"{who} has ended, and the rest of the job cannot continue without it: its own last line says why, or it "
            "was killed (by the system, if memory ran out); `--resume` continues a training"
        ) from error


def worth_a_traceback(record: logging.LogRecord) -> bool:
    """Filter of Detectron2's log of what has ended a training: others get one line, from the caller."""
    return record.exc_info is None or (user_message(record.exc_info[1]) is None and not _suspects(record.exc_info[1]))


def check_same_on_all_ranks(facts: Mapping[str, Any]) -> None:
    """Check that all processes of the job have the same settings: a run of different ones would be none of them.

    Raises:
        ConfigError: in all processes, with the first setting that differs.
    """
    own = {name: value for name, value in facts.items() if not any(fnmatchcase(name, p) for p in _MAY_DIFFER)}
    first, *others = comm.all_gather(own)
    for rank, other in enumerate(others, 1):
        for name in {**first, **other}:
            # NaN is the same as NaN.
            if repr(first.get(name)) != repr(other.get(name)):
                raise ConfigError(
                    f"{name} is {first.get(name)!r} on rank 0, but {other.get(name)!r} on rank {rank}: all processes "
                    "of a job need the same settings"
                )
