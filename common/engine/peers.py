"""The other ranks of a job: whether they run the same, and which of them has died."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from fnmatch import fnmatchcase
from multiprocessing import connection
from typing import Any

import torch.distributed as dist
from detectron2.utils import comm

from d2distill.common.errors import ConfigError, UserError

#: Where a node has its files is its own affair.
_MAY_DIFFER = ("DATASETS.ROOT", "IMPORTS", "*WEIGHTS")
_ENDED = "d2distill_ended_rank"


class Peers:
    """The processes of a job, watched from one of them.

    Args:
        store: of the job.
        pids: of the other ranks on this node, which the system is asked about.
    """

    def __init__(self, store: dist.Store, pids: Mapping[int, int]) -> None:
        self._store, self._handles = store, {}
        for rank, pid in pids.items():
            with suppress(AttributeError, OSError):  # not every system has such handles
                self._handles[os.pidfd_open(pid)] = rank

    def close(self) -> None:
        for handle in self._handles:
            os.close(handle)

    def ended(self) -> int | None:
        """The rank that has ended, None if none has within 3 seconds: a connection breaks before its process ends."""
        if ready := connection.wait(list(self._handles), 2):
            rank = min(self._handles[handle] for handle in ready)
            with suppress(dist.DistError):
                self._store.set(_ENDED, str(rank))  # for the other nodes
            return rank
        try:
            self._store.wait([_ENDED], timedelta(seconds=1))
            return int(self._store.get(_ENDED))
        except dist.DistNetworkError:
            return 0  # which hosts the store, or whose launcher does
        except dist.DistError:
            return None


_peers: Peers | None = None


def watch_peers(peers: Peers | None) -> None:
    """Let :func:`naming_ended_rank` ask these from now on."""
    global _peers
    if _peers is not None:
        _peers.close()
    _peers = peers


@contextmanager
def naming_ended_rank() -> Iterator[None]:
    """Replace an error of the block by a :class:`UserError` that says which other rank has ended, where one has."""
    try:
        yield
    except Exception as error:
        rank = None if _peers is None or isinstance(error, UserError) else _peers.ended()
        if rank is None:
            raise
        raise UserError(
            f"rank {rank} of this job has ended, and the others cannot continue without it: its own last line says "
            "why, or it was killed (by the system, if memory ran out); `--resume` continues a training"
        ) from error


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
