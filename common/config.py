"""The DISTILL node, made of every registered method's own defaults, and how settings are merged."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode as _CfgNode
from yaml.constructor import ConstructorError

from common.distillers import DISTILLERS, Distiller
from common.errors import ConfigError, nearest

__all__ = [
    "CfgNode",
    "CheckedMerge",
    "add_distill_defaults",
    "chosen_methods",
    "import_extensions",
    "read_cfg",
    "resolve_device",
    "without_code",
]


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


def chosen_methods(cfg: _CfgNode) -> dict[str, type[Distiller]]:
    """The methods of DISTILL.METHODS by name.

    Raises:
        ConfigError: an unknown method, or one that is named twice.
    """
    for name in cfg.DISTILL.METHODS:
        if name not in DISTILLERS:
            known = sorted(name for name, _ in DISTILLERS)
            raise ConfigError(f"DISTILL.METHODS: no method {name}{nearest(name, known)}; there are {', '.join(known)}")
    if len(set(cfg.DISTILL.METHODS)) < len(cfg.DISTILL.METHODS):
        raise ConfigError(f"DISTILL.METHODS names a method twice: {list(cfg.DISTILL.METHODS)}")
    return {name: DISTILLERS.get(name) for name in cfg.DISTILL.METHODS}


def read_cfg(get_cfg: Callable[[], _CfgNode], config_file: str, opts: Sequence[Any] | None) -> _CfgNode:
    """Defaults, then a YAML file with its ``_BASE_`` files, then ``KEY VALUE`` pairs; OUTPUT_DIR is after the file.

    Args:
        get_cfg: the defaults, with nodes of :class:`CheckedMerge`.

    Raises:
        ConfigError: unknown keys (named with the nearest known ones), values of another type, YAML that runs code.
        FileNotFoundError: no such file.
    """
    if config_file:
        if not Path(config_file).is_file():
            raise FileNotFoundError(f"--config-file {config_file}: no such file (looked in {Path.cwd()})")
        with without_code(config_file):
            imports = type(get_cfg()).load_yaml_with_base(config_file).get("IMPORTS", [])
        import_extensions(imports, Path(config_file).parent)
    # After that, for own methods bring settings of their own.
    cfg = get_cfg()
    if config_file:
        cfg.merge_from_file(config_file)
    cfg.merge_from_list(list(opts or []))
    # Other processes, and the run folder's copy of these settings, begin elsewhere.
    folder = Path(config_file).resolve().parent
    cfg.IMPORTS = [str(folder / name) if name.endswith(".py") else name for name in cfg.IMPORTS]
    if not cfg.OUTPUT_DIR:
        cfg.OUTPUT_DIR = str(Path("output", Path(config_file).stem or "run"))
    return cfg


@contextmanager
def without_code(name: str) -> Iterator[None]:
    """Turn the refusal of YAML that would run code into an error that says in which file, `name`, it is."""
    try:
        yield
    except ConstructorError as error:
        raise ConfigError(f"{name} has YAML that would run code: {error.problem}") from error


def import_extensions(names: Iterable[str], folder: Path = Path()) -> None:
    """Import what a configuration's IMPORTS names: modules, or files relative to `folder`, each once.

    Raises:
        ConfigError: there is no such module or file.
    """
    for name in names:
        _import(name, folder)


def resolve_device(cfg: _CfgNode) -> torch.device:
    """The device of MODEL.DEVICE.

    Raises:
        ConfigError: no such device here.
    """
    name = cfg.MODEL.DEVICE
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"MODEL.DEVICE {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"MODEL.DEVICE is {name}, but this machine has {torch.cuda.device_count()} GPUs; use cpu or auto"
        )
    return device


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


def _import(name: str, folder: Path) -> None:
    path = folder / name
    if not name.endswith(".py"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"IMPORTS: {error} (a file ends in .py and is relative to the config file)") from error
        return
    if not path.is_file():
        raise ConfigError(f"IMPORTS: there is no file {path.resolve()}")
    # Under the file's own path, so that a second config of the same process does not run it again.
    module_name = f"imported_by_config_{path.resolve()}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise


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
