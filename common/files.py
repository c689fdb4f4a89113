"""Opening what should be a file: a pipe would wait for a writer, and a device has no end."""

import errno
import os
import stat
from typing import IO, Any

__all__ = ["open_regular"]


def open_regular(path: str | os.PathLike, mode: str = "r", **options: Any) -> IO[Any]:
    """:func:`open` for reading; an OSError for what is there and is no regular file, without waiting for it."""

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", name)

    return open(path, mode, opener=opener, **options)
