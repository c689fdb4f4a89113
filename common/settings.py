"""A value as the type that its setting has, however a file or a command line writes it."""

import math
from ast import literal_eval
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from d2distill.common.errors import ConfigError

__all__ = ["as_kind", "fit"]

_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", list: "a list", tuple: "a list"}


def fit(name: str, value: Any, mine: Any, listable: bool = False) -> Any:
    """`value` in a form that yacs takes for the setting `name`, which is `mine` so far.

    Args:
        listable: whether it takes a list as well as text.

    Raises:
        ConfigError: it cannot be read as the setting's type.
    """
    if mine is None:  # one of Detectron2's, of any type
        return value
    if isinstance(mine, CfgNode):
        kinds: tuple[type, ...] = (type(mine), dict)
    elif isinstance(mine, list | tuple) or listable:
        kinds = (list, tuple, str) if listable else (list, tuple)
    else:
        kinds = (float, int) if type(mine) is float else (type(mine),)
    found = as_kind(value, kinds)
    if found is None:
        raise ConfigError(_mismatch(name, value, mine, listable))
    if type(mine) is float:
        return _as_float(found)
    # yacs reads text once more: quotes keep what looks like a number what it is.
    return repr(found) if isinstance(found, str) and _python(found) != found else found


def as_kind(value: Any, kinds: tuple[type, ...]) -> Any:
    """`value` as the first of `kinds` that it can be read as, None if there is none.

    Text is read as Python writes the kind, then as YAML does, then as it stands.
    """
    for kind in kinds:
        readings = [value]
        if isinstance(value, str):
            # YAML's numbers are not all Python's: to it 010 is 8, and 1:30 is 90.
            readings = [_python(value), value] if kind in (int, float) else [_python(value), _yaml(value), value]
        for reading in readings:
            # No bool for an int, which it is to Python.
            if type(reading) is kind or (issubclass(kind, dict) and isinstance(reading, dict)):
                return reading
    return None


def _python(text: str) -> Any:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return text


def _as_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf  # what Python makes of 1e400


def _mismatch(name: str, value: Any, mine: Any, listable: bool) -> str:
    given = "nothing" if value is None else str(value) if isinstance(value, str) and value else repr(value)
    if isinstance(mine, CfgNode):
        return f"config key {name} is a node with keys below it, but was given {given}"
    if isinstance(value, dict):
        return f"config key {name} is a value ({mine!r}), but was given keys below it: {', '.join(map(str, value))}"
    wanted = f"{_WORDS.get(type(mine), type(mine).__name__)}{' or a list' * listable}"
    return f"{name} takes {wanted}, but was given {given}{_mended(value, given, mine)}"


def _mended(value: Any, given: str, mine: Any) -> str:
    if isinstance(mine, list | tuple):
        # One value where several may stand is the usual mistake.
        return "; an empty one is []" if value in (None, "", "None") else f"; write [{given.strip('[](), ')}]"
    if isinstance(mine, str):
        return {type(None): "; empty text is ''", list: "", tuple: ""}.get(type(value), "; put it in quotes")
    return f"; e.g. {mine!r}"
