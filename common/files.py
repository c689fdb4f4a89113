"""What is opened as a file should be one: a pipe would wait for a writer, and a device has no end."""

import errno
import os
import stat
from typing import TypeVar

__all__ = ["regular_file"]
_Path = TypeVar("_Path", str, os.PathLike)


def regular_file(path: _Path) -> _Path:
    """`path` itself, to be opened; an OSError where there is nothing, or no regular file."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return path
