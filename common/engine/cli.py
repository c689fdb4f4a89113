"""Command lines: their arguments, and user errors as one line with exit code 2.

Imports neither torch nor Detectron2, so that `--help` is quick and a missing Detectron2 can be reported.
"""

import argparse
import errno
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from d2distill import __version__
from d2distill.common.engine.interrupts import exit_on_interrupt, local_rank
from d2distill.common.errors import ConfigError, UserError, did_you_mean
from d2distill.common.foreign import FLAGS


class CommandParser(argparse.ArgumentParser):
    """Flags and ``KEY VALUE`` settings in any order; a mistyped flag is an error that names the nearest known one."""

    #: Whether flags may stand among positional arguments. argparse has no subcommands in that mode.
    intermixed = False

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self.add_argument("--version", action="version", version=f"d2distill {__version__}")

    def add_settings(self) -> None:
        """Take ``KEY VALUE`` pairs, as ``opts``."""
        self.intermixed = True
        self.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings that replace those of the file")

    def add_runs(self, output: str) -> None:
        """Take the flags of all commands that train several runs."""
        self.add_argument("--output", default=output, metavar="DIR", help="of the runs (default: %(default)s)")
        jobs = "runs at a time (default: one per GPU; 2 without)"
        self.add_argument("--jobs", "--processes", type=int, default=0, metavar="N", help=jobs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parse = self.parse_known_intermixed_args if self.intermixed else self.parse_known_args
        parsed, unknown = parse(args, namespace)
        if unknown:
            flags, flag = re.findall(r"--[\w-]+", self.format_usage()), unknown[0].partition("=")[0]
            if flag in FLAGS and "--config-file" in flags:
                self.error(f"unknown argument {unknown[0]}: here it is {FLAGS[flag]}")
            self.error(f"unknown argument {unknown[0]}{did_you_mean(flag, flags)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def run_cli(main: Callable[[], object]) -> None:
    """Run a command line's `main` with :func:`user_errors`."""
    with user_errors():
        main()


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a user error in one line and exit with code 2; after Ctrl-C, with one line and code 130.

    In a job, errors before :func:`.join_job` are the same in all processes: one per node prints them.
    """
    before = logging.raiseExceptions
    # On a full disk every log line would print a traceback; what cannot do without the disk raises by itself.
    logging.raiseExceptions = False
    try:
        with exit_on_interrupt():
            yield
    except Exception as error:
        exit_with_error(error, silent=local_rank() != 0)
    finally:
        logging.raiseExceptions = before


def exit_with_error(error: Exception, silent: bool = False) -> NoReturn:
    """Exit with code 2 after a user error, printed in one line unless `silent`; raise any other error."""
    message = user_message(error)
    if message is None:
        raise error
    if debugging():  # in every process
        traceback.print_exception(error)
    if debugging() or not silent:
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2) from None


def user_message(error: Exception) -> str | None:
    """What to tell the user about an error outside the program; None for a fault of the program."""
    if isinstance(error, UserError | FileNotFoundError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # names no file
        return f"a file cannot be written: {error.strerror}"
    return None


def debugging() -> bool:
    """Whether the command line asks for tracebacks. Processes that it starts have the same ``sys.argv``."""
    return "--debug" in sys.argv[1:]
