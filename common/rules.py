"""What values of settings must be."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode

from d2distill.common.errors import ConfigError


class Rule(NamedTuple):
    """A test of a value. The error reads: KEY is VALUE, but must be `description`."""

    description: str
    predicate: Callable[[Any], bool]


def at_least(low: float) -> Rule:
    """A finite number from `low` on."""
    return Rule(f"at least {low}", lambda value: low <= value < math.inf)


def _all(values: Any, *types: type) -> bool:
    return isinstance(values, list | tuple) and all(type(value) in types for value in values)


BELOW_ONE = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)
NUMBERS = Rule(
    "a list of numbers", lambda value: _all(value, int, float) and all(-math.inf < x < math.inf for x in value)
)
INCREASING = Rule(
    "a list of increasing numbers, from 1 on, or all between 0 and 1 as shares of the run",
    lambda value: (
        NUMBERS.predicate(value)
        and list(value) == sorted(set(value))
        and (min(value, default=1) >= 1 or 0 < min(value) <= max(value) < 1)
    ),
)
LIST_OF_STR = Rule("a list of names", lambda value: _all(value, str))
LOGGERS = Rule(
    "a list of tensorboard, csv, wandb and mlflow",
    lambda value: _all(value, str) and set(value) <= {"tensorboard", "csv", "wandb", "mlflow"},
)
STR_OR_LIST = Rule("a name, or a list of names", lambda value: isinstance(value, str) or _all(value, str))


def check_rules(cfg: CfgNode, rules: Mapping[Rule, Sequence[str]]) -> None:
    """Check settings by their full names; the :class:`ConfigError` names the key, its value, and what is right."""
    for rule, keys in rules.items():
        for key in keys:
            value = reduce(dict.__getitem__, key.split("."), cfg)
            if not rule.predicate(value):
                raise ConfigError(f"{key} is {value!r}, but must be {rule.description}")
