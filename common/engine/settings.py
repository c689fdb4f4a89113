"""What a run is made with: kept in its checkpoints, and compared with what it is resumed with."""

from collections.abc import Mapping
from typing import Any

from detectron2.solver import LRMultiplier
from fvcore.common.config import CfgNode
from torch.optim import Optimizer

__all__ = ["apply_new_hyperparams", "config_diff", "flat_settings", "param_group_hparams"]

#: Which folder it is, and what a run only begins with: another value changes nothing in a run that goes on.
_OF_NO_EFFECT = ("OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.STUDENT.WEIGHTS")


def flat_settings(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """All settings as ``{"NODE.KEY": value}``; a tuple and a list are the same."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat.update(flat_settings(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def config_diff(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``"KEY old -> new"`` for what both have and that makes a difference to a run that goes on."""
    keys = [key for key in now if key in before and key not in _OF_NO_EFFECT]
    return [f"{key} {before[key]!r} -> {now[key]!r}" for key in keys if before[key] != now[key]]


def param_group_hparams(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Of each group of a freshly built optimiser everything but its parameters and the scheduled learning rate."""
    return [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]


def apply_new_hyperparams(
    optimizer: Optimizer, schedule: LRMultiplier, before: list[dict[str, Any]], now: list[dict[str, Any]]
) -> None:
    """Give a restored optimiser the settings that it is built with `now` and was not `before`, and its learning rates.

    A restored group has its old settings. The others are left as they are: an optimiser may keep a state among them.
    """
    for group, old, new in zip(optimizer.param_groups, before, now, strict=True):
        group.update({key: value for key, value in new.items() if key in old and old[key] != value})
    schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    # Of the step that comes next. The same as before where neither the schedule nor its length is another.
    for group, rate in zip(optimizer.param_groups, schedule.get_lr(), strict=True):
        group["lr"] = rate
