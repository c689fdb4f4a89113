"""One job at a time writes into a folder: a lock that the kernel releases however the process ends."""

import errno
import fcntl
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from d2distill.common.errors import ConfigError, OutputError
from d2distill.common.text import printable

__all__ = ["check_folder", "folder_user", "lock_folder"]

#: In the folder while it is held: who holds it. A file that a killed process left is not locked, and means nothing.
LOCK = "run.lock"
#: What flock raises where another process has the lock; some NFS servers answer with the second.
_TAKEN = (BlockingIOError, PermissionError)
#: Names that write_atomically gives, with the number of its process or a random one.
_TEMPORARY = re.compile(r"\.[0-9a-f]+\.tmp$")
#: The descriptors of the folders that this process holds.
_held: dict[Path, int] = {}


def _close_in_child() -> None:
    # The lock is the descriptor's: a loader's worker that outlives its process must not keep it.
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def lock_folder(folder: str | Path, key: str = "OUTPUT_DIR") -> Iterator[str]:
    """Make a folder, and hold it for the block; gives a warning where its filesystem knows no locks, else "".

    That it can be written to is seen at once: the lock is a file that says who holds it. Temporary files that killed
    processes left there are removed.

    Args:
        key: the setting or flag that names the folder.

    Raises:
        ConfigError: another process holds it, or it cannot be written to.
    """
    path, user = Path(folder, LOCK), f"process {os.getpid()} on {socket.gethostname()} since "
    user += f"{datetime.now():%Y-%m-%d %H:%M:%S}: {shlex.join(sys.argv)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, refusal = _open_locked(path)
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, user.encode(errors="backslashreplace"))
            os.fsync(descriptor)  # other nodes read it
        except OSError:
            os.close(descriptor)
            raise
    except _InUse as taken:
        raise ConfigError(
            f"{key} {folder} is in use by {taken}; wait for it, stop it, or choose another {key}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{key} {folder} cannot be used: {error.strerror}; choose one that can be written to"
        ) from error
    _held[path.parent] = descriptor
    try:
        if refusal:
            yield f"{key} {folder} cannot be locked ({refusal}): make sure that no other run writes into it"
        else:
            with suppress(OSError):
                for stale in filter(_TEMPORARY.search, map(str, path.parent.iterdir())):
                    os.unlink(stale)  # nobody else writes here
            yield ""
    finally:
        if _held.pop(path.parent, None) == descriptor:  # not in a forked child
            if _is_file(path, descriptor):
                with suppress(OSError):
                    path.unlink()
            os.close(descriptor)


def check_folder(folder: str | Path) -> None:
    """Raise an OutputError where a folder that this process holds was removed, or replaced by another run's."""
    descriptor = _held.get(Path(folder))
    if descriptor is not None and not _is_file(Path(folder, LOCK), descriptor):
        raise OutputError(f"{folder} was removed, or its {LOCK}: this run stops, since another may write there now")


def folder_user(folder: str | Path) -> str:
    """The process that holds a folder; "" if none does, or its filesystem knows no locks."""
    try:
        descriptor = os.open(Path(folder, LOCK), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except _TAKEN:
        return _user(descriptor)
    except OSError:
        return ""
    finally:
        os.close(descriptor)
    return ""


class _InUse(Exception):
    """By the process that the message names."""


def _open_locked(path: Path) -> tuple[int, str]:
    """The descriptor of the locked file, and why it could not be locked where the filesystem knows no locks."""
    deadline = time.monotonic() + 0.2  # others look for a moment who holds it
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except _TAKEN:
            user = _user(descriptor)
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise _InUse(user) from None
            time.sleep(0.05)
            continue
        except OSError as error:
            return descriptor, error.strerror
        if _is_file(path, descriptor):
            return descriptor, ""
        os.close(descriptor)  # of a process that has removed it since


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except OSError as error:
        # Any other one, such as of a server that does not answer now, says nothing.
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


def _user(descriptor: int) -> str:
    return printable(os.pread(descriptor, 1000, 0).decode(errors="replace")) or "another process"
