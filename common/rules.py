"""Rules for settings: what a value must be, in words and as a test."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fvcore.common.config import CfgNode

from d2distill.common.errors import ConfigError

__all__ = [
    "FRACTION",
    "MOMENTUM",
    "NUMBERS",
    "RISING",
    "TEXTS",
    "TEXT_OR_TEXTS",
    "Rule",
    "above",
    "at_least",
    "check_rules",
    "is_number",
    "refuse_nan",
]


@dataclass(frozen=True)
class Rule:
    """What a setting must be: ``KEY is VALUE, but must be`` goes on with `words`."""

    words: str
    holds: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether it is a number, and finite."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def at_least(low: float, most: float = math.inf) -> Rule:
    """A number from `low` on, up to `most`."""
    limit = f" and at most {most}" if math.isfinite(most) else ""
    return Rule(f"at least {low}{limit}", lambda value: is_number(value) and low <= value <= most)


def above(low: float) -> Rule:
    """A number that is larger than `low`."""
    return Rule(f"above {low}", lambda value: is_number(value) and value > low)


def _each(value: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(test, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _rises(values: Any) -> bool:
    return _each(values, is_number) and list(values) == sorted(set(values)) and all(value >= 1 for value in values)


FRACTION = Rule("from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
MOMENTUM = Rule("at least 0 and below 1", lambda value: is_number(value) and 0 <= value < 1)
NUMBERS = Rule("a list of numbers", lambda value: _each(value, is_number))
RISING = Rule("a list of numbers from 1 on, each once and in order", _rises)
TEXTS = Rule("a list of names", lambda value: _each(value, _is_text))
TEXT_OR_TEXTS = Rule("a name, or a list of names", lambda value: _is_text(value) or _each(value, _is_text))


def check_rules(cfg: CfgNode, rules: Mapping[str, Rule]) -> None:
    """Check settings by their full names.

    Raises:
        ConfigError: with the key, its value, and what would be right.
    """
    for key, rule in rules.items():
        value = cfg
        for part in key.split("."):
            value = value[part]
        if not rule.holds(value):
            infinite = isinstance(value, float) and not math.isfinite(value)
            raise ConfigError(f"{key} is {value!r}, but must be {'a finite number, ' * infinite}{rule.words}")


def refuse_nan(cfg: CfgNode, prefix: str = "") -> None:
    """Look for values that are not a number, in lists as well. Infinite ones may have a sense, as the order of a norm.

    Raises:
        ConfigError: there is one.
    """
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            refuse_nan(value, f"{prefix}{key}.")
        elif any(item != item for item in (value if isinstance(value, list | tuple) else [value])):
            raise ConfigError(f"{prefix}{key} is {value!r}, but must be a number")
