"""What a library raises while something is built from settings, as one line that names the settings."""

import linecache
import re
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from d2distill.common.config import EXTENSIONS
from d2distill.common.engine.cli import user_message
from d2distill.common.errors import ConfigError

__all__ = ["building", "extension_line"]


@contextmanager
def building(node: str, cfg: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turn whatever a library, or code of IMPORTS, raises inside into one ConfigError; ``--debug`` has the traceback.

    Detectron2, fvcore, timm and torch refuse a setting by a KeyError, an assertion, a TypeError ... that knows nothing
    of settings. The line names those below `node` that the failing statement reads as ``cfg.NODE.KEY``; else those
    whose value the library's message has; else the nodes of those that a statement around reads; else `node`. Errors
    for users, of files, of processes that lost each other, and of a training that diverged pass. Of what trains it is
    for the first step alone: a later fault is no setting's.

    Args:
        node: what is built, by its settings: ``MODEL.STUDENT``, ``SOLVER``.
        cfg: the whole configuration.
    """
    try:
        yield
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        lost_peer = frame.f_globals.get("__name__", "").startswith(("torch.distributed", "torch.nn.parallel"))
        if lost_peer or isinstance(error, FloatingPointError) or user_message(error) is not None:
            raise
        raise ConfigError(_explain(node, cfg or {}, error)) from error


def extension_line(error: BaseException) -> str:
    """``FILE, line N``: the innermost line in a module of IMPORTS that an error passed through; empty if in none."""
    lines = [
        f"{frame.f_code.co_filename}, line {line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if EXTENSIONS & {name := frame.f_globals.get("__name__", ""), name.partition(".")[0]}
    ]
    return lines[-1] if lines else ""


def _explain(node: str, cfg: Mapping[str, Any], error: Exception) -> str:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    line, module = traceback.extract_tb(error.__traceback__)[-1].line or "", frame.f_globals.get("__name__", "")
    extension = extension_line(error)
    # Of a bare assertion the line says what was asserted; of a table's KeyError the text is the key.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    # torch appends a stack of its C++ functions.
    reason = textwrap.shorten(text.partition("\nException raised from")[0] or line, 400)
    if module.startswith("d2distill.") and not extension and line.startswith("raise "):
        return f"{node}: {reason}"  # a sentence for users already
    *around, failing = traceback.extract_tb(error.__traceback__)
    said, read = _settings_in(reason, node, cfg), _settings_read(around, node, cfg)
    if len(said) > 3:
        said = []  # a number as many settings have it
    if len(read) > 1:  # of which any may be at fault
        read = list(dict.fromkeys(name.partition(" ")[0].rpartition(".")[0] for name in read))
    key = ", ".join((_settings_read([failing], node, cfg) or said or read)[:3]) or node
    if isinstance(error, KeyError) and " " not in reason:
        reason = f"{reason} is unknown"
    return f"{key}: {reason} ({type(error).__name__} in {extension or module}; --debug shows the traceback)"


def _settings_in(reason: str, node: str, cfg: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``KEY VALUE`` of the settings below `node` of which `reason` has the value, or an entry of it.

    A number counts where it is all that `reason` says, as in the KeyError of a table.
    """
    found: list[str] = []
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            found += _settings_in(reason, node, value, f"{prefix}{key}.")
        elif f"{prefix}{key}.".startswith(f"{node}."):
            entries = value if isinstance(value, list | tuple) else [value]
            if any(_says(reason, entry) for entry in entries):
                found.append(f"{prefix}{key} {value}")
    return found


def _settings_read(frames: Sequence[traceback.FrameSummary], node: str, cfg: Mapping[str, Any]) -> list[str]:
    """``KEY VALUE`` of the settings below `node` that the last statement that reads any reads as ``cfg.NODE.KEY``."""
    above = "TEACHER." if node.startswith("TEACHER.") else ""  # of which a configuration of its own was made
    for frame in reversed(frames):
        # Python 3.10 does not know where a statement ends.
        last = getattr(frame, "end_lineno", None) or frame.lineno
        statement, found = "".join(linecache.getlines(frame.filename)[frame.lineno - 1 : last]), []
        for name in dict.fromkeys(re.findall(r"\bcfg\.([A-Z0-9_.]+)\b", statement)):
            value: Any = cfg
            for part in f"{above}{name}".split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if f"{above}{name}".startswith(f"{node}.") and value is not None and not isinstance(value, Mapping):
                found.append(f"{above}{name} {value}")
        if found:
            return found
    return []


def _says(reason: str, value: Any) -> bool:
    if not isinstance(value, str):
        return reason == str(value)
    return value != "" and re.search(rf"(?<![\w./-]){re.escape(value)}(?![\w./-])", reason) is not None
