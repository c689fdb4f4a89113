"""The DISTILL node, made of every registered method's own defaults, and how settings are merged."""

from typing import Any

from fvcore.common.config import CfgNode as _CfgNode

from common.distillers import DISTILLERS
from common.errors import ConfigError, nearest

__all__ = ["CfgNode", "CheckedMerge", "add_distill_defaults"]


def add_distill_defaults(cfg: _CfgNode) -> None:
    """Add the node DISTILL to `cfg`: METHODS, CE_WEIGHT, and one node per registered method."""
    node = type(cfg)()
    # Any number of registered methods at once; an empty list is plain training.
    node.METHODS = []
    # Weight of the task's own cross-entropy (classification).
    node.CE_WEIGHT = 1.0
    for name, method in DISTILLERS:
        node[name.upper()] = type(cfg)({**method.common_defaults(), **method.defaults()})
    cfg.DISTILL = node


class CheckedMerge:
    """Mix-in for fvcore's and Detectron2's CfgNode: an unknown key is named with the nearest known ones.

    A whole number is taken where a float is expected.
    """

    #: Keys that take a string or a list.
    LISTABLE: tuple[str, ...] = ()

    def merge_from_other_cfg(self, cfg_other: _CfgNode) -> None:
        """Merge the settings of another node.

        Raises:
            ConfigError: an unknown key, or a value of another type.
        """
        _check(self, cfg_other, _leaves(self), self.LISTABLE)
        try:
            super().merge_from_other_cfg(cfg_other)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        """Merge ``["KEY", value, ...]``, as a command line gives them.

        Raises:
            ConfigError: a key without a value, an unknown key, or a value of another type.
        """
        if len(cfg_list) % 2:
            raise ConfigError(f"settings come as KEY VALUE pairs, but {cfg_list[-1]!r} has no value: {cfg_list}")
        for key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            nested: Any = self._decode_cfg_value(value)
            for part in reversed(key.split(".")):
                nested = {part: nested}
            # Through a node, so that what is checked for a file is checked for a command line as well.
            self.merge_from_other_cfg(type(self)(nested))


class CfgNode(CheckedMerge, _CfgNode):
    """fvcore's CfgNode (yacs with ``_BASE_`` files) with checked merging."""


def _leaves(node: _CfgNode, prefix: str = "") -> list[str]:
    names = []
    for key, value in node.items():
        names += _leaves(value, f"{prefix}{key}.") if isinstance(value, _CfgNode) else [prefix + key]
    return names


def _check(
    node: _CfgNode, other: _CfgNode, known: list[str], listable: tuple[str, ...], path: tuple[str, ...] = ()
) -> None:
    for key, value in other.items():
        name = ".".join((*path, key))
        if key not in node:
            if node.is_new_allowed():
                continue
            raise ConfigError(f"unknown config key {name}{nearest(name, known)}")
        mine = node[key]
        if isinstance(mine, _CfgNode) and isinstance(value, _CfgNode):
            _check(mine, value, known, listable, (*path, key))
        elif isinstance(mine, _CfgNode) != isinstance(value, _CfgNode):
            kind = "a node with keys below it" if isinstance(mine, _CfgNode) else f"a value ({mine!r})"
            raise ConfigError(f"config key {name} is {kind}, but was given {value!r}")
        elif type(mine) is float:
            decoded = other._decode_cfg_value(value)
            if type(decoded) is int:
                other[key] = float(decoded)
        elif name in listable:
            # yacs lets no value change its type: give the old one the type of the new.
            node[key] = type(other._decode_cfg_value(value))()
