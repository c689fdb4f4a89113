"""The DISTILL node, made of every registered method's own defaults, and how settings are merged."""

from typing import Any

from detectron2.config import CfgNode as Detectron2CfgNode
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
        node[name.upper()] = type(cfg)({"WEIGHT": 1.0, "WARMUP": 0, **method.defaults()})
    cfg.DISTILL = node


class CheckedMerge:
    """Mix-in for fvcore's and Detectron2's CfgNode: an unknown key is named with the nearest known ones.

    A whole number is taken where a float is expected.
    """

    def merge_from_other_cfg(self, cfg_other: _CfgNode) -> None:
        _check(self, cfg_other, known=_leaves(self), path=())
        super().merge_from_other_cfg(cfg_other)

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        """Merge ``["KEY", value, ...]``, as a command line gives them.

        Raises:
            ConfigError: a key without a value, or an unknown key.
        """
        if len(cfg_list) % 2:
            raise ConfigError(f"settings come as KEY VALUE pairs, but {cfg_list[-1]!r} has no value: {cfg_list}")
        known = _leaves(self)
        for key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            nested: Any = self._decode_cfg_value(value)
            for part in reversed(key.split(".")):
                nested = {part: nested}
            # Through a node, so that what is checked for a file is checked for a command line as well.
            node = type(self)(nested)
            _check(self, node, known, path=())
            super().merge_from_other_cfg(node)


class CfgNode(CheckedMerge, Detectron2CfgNode):
    """Detectron2's CfgNode, which its engine asks for, with checked merging and without its version upgrades."""

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file and its ``_BASE_`` files; no tag in it runs code.

        Raises:
            ConfigError: an unknown key.
        """
        _CfgNode.merge_from_file(self, cfg_filename, allow_unsafe)


def _leaves(node: _CfgNode, prefix: str = "") -> list[str]:
    names = []
    for key, value in node.items():
        names += _leaves(value, f"{prefix}{key}.") if isinstance(value, _CfgNode) else [prefix + key]
    return names


def _check(node: _CfgNode, other: _CfgNode, known: list[str], path: tuple[str, ...]) -> None:
    for key, value in other.items():
        name = ".".join((*path, key))
        if key not in node:
            if node.is_new_allowed():
                continue
            raise ConfigError(f"unknown config key {name}{nearest(name, known)}")
        mine = node[key]
        if isinstance(mine, _CfgNode) and isinstance(value, _CfgNode):
            _check(mine, value, known, (*path, key))
        elif isinstance(mine, _CfgNode) != isinstance(value, _CfgNode):
            kind = "a node with keys below it" if isinstance(mine, _CfgNode) else f"a value ({mine!r})"
            raise ConfigError(f"config key {name} is {kind}, but was given {value!r}")
        elif type(mine) is float:
            decoded = other._decode_cfg_value(value)
            if type(decoded) is int:
                other[key] = float(decoded)
