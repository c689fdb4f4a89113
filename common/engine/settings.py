"""What a run is made with: kept in its checkpoints, and compared with what it is resumed with."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from fvcore.common.config import CfgNode

if TYPE_CHECKING:
    from detectron2.solver import LRMultiplier
    from torch.optim import Optimizer

#: Which folder it is, and where files are: another value changes nothing in a run that continues.
_OF_NO_EFFECT = ("OUTPUT_DIR", "IMPORTS", "DATASETS.ROOT", "*MODEL.WEIGHTS", "MODEL.STUDENT.WEIGHTS")


def flat_settings(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """All settings as ``{"NODE.KEY": value}``; a tuple and a list are the same."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat.update(flat_settings(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def config_diff(before: Mapping[str, Any], now: Mapping[str, Any], may_change: Iterable[str] = ()) -> list[str]:
    """``"KEY was old, now new"`` for every setting that differs, makes a difference, and matches no pattern given."""
    patterns = [*may_change, *_OF_NO_EFFECT]
    methods = {name.upper() for name in now.get("DISTILL.METHODS", ())}

    def counts(key: str) -> bool:
        node, _, rest = key.removeprefix("DISTILL.").partition(".")
        idle = key.startswith("DISTILL.") and rest and node not in methods  # a method that is not chosen
        return not idle and not any(fnmatchcase(key, pattern) for pattern in patterns)

    different = [key for key in now if key in before and before[key] != now[key] and counts(key)]
    return [_difference(key, before[key], now[key]) for key in different]


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, list) and isinstance(now, list) and max(len(before), len(now)) > 10:
        # Such as the names of a thousand classes.
        pairs = enumerate(zip_longest(before, now))
        key, before, now = next((f"{key}[{number}]", *pair) for number, pair in pairs if pair[0] != pair[1])
    return f"{key} was {before!r}, now {now!r}"


def param_group_hparams(optimizer: "Optimizer") -> list[dict[str, Any]]:
    """Of each group of a freshly built optimizer everything but its parameters and the scheduled learning rate.

    Nor how it is computed: the state of an optimizer that was not fused does not lie where a fused one reads it.
    """
    left_out = ("params", "lr", "fused")
    return [{k: v for k, v in group.items() if k not in left_out} for group in optimizer.param_groups]


def apply_new_hyperparams(
    optimizer: "Optimizer", schedule: "LRMultiplier", before: list[dict[str, Any]], now: list[dict[str, Any]]
) -> None:
    """Give a restored optimizer the hyperparameters that it is built with `now` and was not `before`.

    A restored group has its old ones. The others stay as they are: an optimizer may keep a state among them. The
    schedule sets the learning rates from them at its next step.
    """
    for group, old, new in zip(optimizer.param_groups, before, now, strict=True):
        group.update({key: value for key, value in new.items() if key in old and old[key] != value})
    schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
