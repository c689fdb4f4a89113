"""Errors that say what was wrong, where, and how to mend it. Commands print them without a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["CheckpointError", "ConfigError", "DataError", "DivergedError", "OutputError", "UserError", "did_you_mean"]


class UserError(Exception):
    """Something outside the program is wrong: a configuration, a file, the machine."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged, or not of the network it is meant for."""


class DataError(UserError, ValueError):
    """A data set that is incomplete, or holds something unreadable."""


class DivergedError(UserError, FloatingPointError):
    """A training whose losses or weights are no longer finite.

    Args:
        what: became so; a sentence.
        way_on: where the run can be taken up again.
    """

    def __init__(self, what: str, way_on: str = "") -> None:
        super().__init__(f"{what} Lower SOLVER.BASE_LR, warm up, or clip gradients{way_on and '; '}{way_on}")
        # Processes tell each other of it: a copy is made of the same words.
        self.what, self.way_on = what, way_on

    def __reduce__(self) -> tuple:
        return DivergedError, (self.what, self.way_on)


class OutputError(UserError, OSError):
    """A file that cannot be written."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Text " (did you mean ...?)" with the known names closest to `name`, case ignored; empty where none is close."""
    by_lower = {k.lower(): k for k in known}
    close = get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(by_lower[c] for c in close)}?)" if close else ""
