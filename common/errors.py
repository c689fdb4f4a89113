"""User-facing errors. Command lines print them without a traceback."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec

__all__ = [
    "CheckpointError", "ConfigError", "DataError", "DivergedError", "MissingDependencyError", "OutputError",
    "UserError", "did_you_mean", "require_detectron2", "writing",
]  # fmt: skip


class UserError(Exception):
    """Something outside the program is wrong: a configuration, a file, the machine."""

    #: Whether line feeds in its text are meant. Others are of a name, and are shown escaped.
    several_lines = False


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged, or not of the network it is meant for."""


class DataError(UserError, ValueError):
    """A data set that is incomplete, or holds something unreadable."""


class DivergedError(UserError, FloatingPointError):
    """A training whose losses or weights are no longer finite.

    Args:
        what: is not finite; a sentence.
        hint: where the run can be continued from.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        # The arguments are what is pickled when ranks send each other the error.
        super().__init__(what, hint)
        self.what, self.hint = what, hint

    def __str__(self) -> str:
        return f"{self.what} Lower SOLVER.BASE_LR, warm up, or clip gradients{self.hint and '; '}{self.hint}"


class OutputError(UserError, OSError):
    """A file that cannot be written."""


@contextmanager
def writing(what: object, done: str = "written") -> Iterator[None]:
    """Turn what the system raises while `what` is `done`, as on a full or removed disk, into an OutputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides a write that failed
        if isinstance(error, UserError) or not isinstance(cause, OSError):
            raise
        raise OutputError(
            f"{what} cannot be {done}: {cause.strerror or cause}; check free space and permissions, or choose another"
        ) from error


class MissingDependencyError(UserError, ImportError):
    """A package that is not installed."""


def require_detectron2() -> None:
    """Raise a MissingDependencyError with the command that installs Detectron2, where it is not."""
    if find_spec("detectron2") is None:
        raise MissingDependencyError(
            "Detectron2 is not installed: `python -m d2distill.tools.setup_env --detectron2` installs it, or see "
            "https://detectron2.readthedocs.io/tutorials/install.html"
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Text " (did you mean ...?)" with the known names closest to `name`, case ignored; empty where none is close."""
    by_lower = {k.lower(): k for k in known}
    close = get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(by_lower[c] for c in close)}?)" if close else ""
