"""Ctrl-C ends a command line with one line and exit code 130, whatever it is doing; a second one changes nothing.

Python's own handler raises a KeyboardInterrupt, which is lost where an exception cannot leave (at a fork, in a
destructor), becomes another error in the import of a C extension, and interrupts the clean-up after the first one.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

#: 128 + SIGINT: what a shell reports.
_INTERRUPTED = 130
#: In seconds: the clean-up has so long, and an interrupt that something swallowed comes so late.
_PATIENCE = 5


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """End the block, which is all that the process does, on Ctrl-C; once it has ended, Ctrl-C is ignored.

    In threads, and where the shell has Ctrl-C ignored (nohup, ``&``), nothing is changed.
    """
    handled = threading.current_thread() is threading.main_thread()
    handled = handled and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handled:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BaseException as error:
        # Whatever else comes out after an interrupt is a consequence of it.
        if not isinstance(error, KeyboardInterrupt) and not _interrupted():
            raise
        _report()
        raise SystemExit(_INTERRUPTED) from None
    finally:
        if handled:
            # The exit code is decided, and the interpreter's end would print tracebacks.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if _interrupted():
            signal.alarm(0)
            sys.unraisablehook = sys.__unraisablehook__


def interrupt(*_: Any) -> NoReturn:
    """Signal handler: the first interrupt raises KeyboardInterrupt, further ones are ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.unraisablehook = _unraisable
    signal.signal(signal.SIGALRM, _end)
    signal.alarm(_PATIENCE)
    raise KeyboardInterrupt


def local_rank() -> int:
    """This process's number on its node, as torchrun or srun says it; 0 outside of jobs."""
    value = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return int(value) if value.isdecimal() else 0


def _interrupted() -> bool:
    return sys.unraisablehook is _unraisable


def _unraisable(unraisable: Any) -> None:
    # Other errors are consequences, such as those of destructors of what is built by half.
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _end()


def _end(*_: Any) -> NoReturn:
    multiprocessing = sys.modules.get("multiprocessing")
    children = multiprocessing.active_children() if multiprocessing else []
    for child in children:
        child.terminate()
    for child in children:
        child.join(1)
    _report()
    os._exit(_INTERRUPTED)


def _report() -> None:
    if local_rank() == 0:
        os.write(2, b"interrupted\n")  # not by print(), in whose middle the signal may have come
