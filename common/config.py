"""The DISTILL node, made of every registered method's own defaults, and how settings are merged."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode as _CfgNode

from d2distill.common.distillers import DISTILLERS, Distiller
from d2distill.common.errors import ConfigError, did_you_mean
from d2distill.common.rules import TEXTS, check_rules
from d2distill.common.settings import as_kind, fit
from d2distill.common.yaml_files import check_tree, reading

__all__ = [
    "CfgNode",
    "CheckedMerge",
    "add_distill_defaults",
    "chosen_methods",
    "import_extensions",
    "read_cfg",
    "resolve_device",
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
        ConfigError: no list of names, an unknown method, or one that is named twice.
    """
    check_rules(cfg, {"DISTILL.METHODS": TEXTS})
    for name in cfg.DISTILL.METHODS:
        if name not in DISTILLERS:
            known = sorted(name for name, _ in DISTILLERS)
            raise ConfigError(
                f"DISTILL.METHODS: no method {name}{did_you_mean(name, known)}; there are {', '.join(known)}"
            )
    if len(set(cfg.DISTILL.METHODS)) < len(cfg.DISTILL.METHODS):
        raise ConfigError(f"DISTILL.METHODS names a method twice: {list(cfg.DISTILL.METHODS)}")
    return {name: DISTILLERS.get(name) for name in cfg.DISTILL.METHODS}


def read_cfg(get_cfg: Callable[[], _CfgNode], config_file: str, opts: Sequence[Any] | None) -> _CfgNode:
    """Defaults, then a YAML file with its ``_BASE_`` files, then ``KEY VALUE`` pairs; OUTPUT_DIR is after the file.

    OUTPUT_DIR and the files of IMPORTS become absolute: other processes, and the run folder's copy of these settings,
    begin elsewhere.

    Args:
        get_cfg: the defaults, with nodes of :class:`CheckedMerge`.

    Raises:
        ConfigError: unknown keys (named with the nearest known ones), values of another type, a file that is no YAML
            of settings or would run code.
        FileNotFoundError: no such file.
    """
    opts = list(opts or [])
    folder = Path(config_file).parent.resolve()
    import_extensions(_imports(get_cfg(), config_file, opts), folder)
    # After that, for own methods bring settings of their own.
    cfg = get_cfg()
    if config_file:
        cfg.merge_from_file(config_file)
    cfg.merge_from_list(opts)
    cfg.IMPORTS = [str(folder / name) if name.endswith(".py") else name for name in cfg.IMPORTS]
    output = cfg.OUTPUT_DIR or os.path.join("output", Path(config_file).stem or "run")
    cfg.OUTPUT_DIR = os.path.abspath(os.path.expanduser(output))
    return cfg


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
        if device.type not in ("cpu", "cuda"):
            torch.zeros(1, device=device).item()  # meta has no numbers; others need another build of torch
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ConfigError(f"MODEL.DEVICE {name}: {reason}; use cpu, cuda or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"MODEL.DEVICE is {name}, but this machine has {torch.cuda.device_count()} GPUs; use cpu or auto"
        )
    return device


class CheckedMerge:
    """Mix-in for fvcore's and Detectron2's CfgNode: what is wrong with a file, a key or a value is said in one line.

    An unknown key is named with the nearest known ones. A whole number is taken where a float is expected, text that
    looks like something else where text is, and text is read as YAML has it where neither text nor Python's form is.
    """

    #: Keys that take a string or a list.
    LISTABLE: tuple[str, ...] = ()

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """The settings of a YAML file over those of its ``_BASE_`` files; none if it is empty.

        Raises:
            ConfigError: it, or one of them, is no YAML of settings or would run code.
            FileNotFoundError: no such file.
        """
        with reading(filename):
            with cls._open_cfg(filename) as file:
                filled = check_tree(file.read())
            return super().load_yaml_with_base(filename, allow_unsafe) if filled else {}

    @classmethod
    def _decode_cfg_value(cls, value: Any) -> Any:
        try:
            return super()._decode_cfg_value(value)
        except (TypeError, MemoryError, RecursionError):  # of Python's parser, for the like of "{[]: 1}"
            return value

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file with its ``_BASE_`` files.

        Raises:
            ConfigError: as :meth:`load_yaml_with_base` and :meth:`merge_from_other_cfg`, with the file.
            FileNotFoundError: no such file.
        """
        try:
            super().merge_from_file(cfg_filename, allow_unsafe)
        except ConfigError as error:
            if str(cfg_filename) in str(error):
                raise
            raise ConfigError(f"{cfg_filename}: {error}") from error

    def merge_from_other_cfg(self, cfg_other: _CfgNode) -> None:
        """Merge the settings of another node.

        Raises:
            ConfigError: an unknown key, or a value of another type.
        """
        cfg_other = cfg_other.clone()  # values become those of the settings' types
        _check(self, cfg_other, _names(self), self.LISTABLE)
        super().merge_from_other_cfg(cfg_other)

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        """Merge ``["KEY", value, ...]``, as a command line gives them.

        Raises:
            ConfigError: a key without a value, an unknown key, or a value of another type.
        """
        if len(cfg_list) % 2:
            raise ConfigError(f"settings come as KEY VALUE pairs, but {cfg_list[-1]!r} has no value: {cfg_list}")
        for key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            nested: Any = value
            for part in reversed(key.split(".")):
                nested = {part: nested}
            # Through a node, so that what is checked for a file is checked for a command line as well.
            self.merge_from_other_cfg(_node(type(self), nested))


class CfgNode(CheckedMerge, _CfgNode):
    """fvcore's CfgNode (yacs with ``_BASE_`` files) with checked merging."""


def _imports(cfg: _CfgNode, config_file: str, opts: list[Any]) -> list[str]:
    """IMPORTS as the file and the pairs give it, before the settings that it brings are known."""
    given = cfg.IMPORTS
    if config_file:
        if os.path.isdir(config_file):
            raise ConfigError(f"--config-file {config_file} is a folder: name a YAML file in it")
        if not os.path.isfile(config_file):
            raise FileNotFoundError(f"--config-file {config_file}: no such file (looked in {Path.cwd()})")
        given = cfg.load_yaml_with_base(config_file).get("IMPORTS", given)
    given = dict(zip(opts[0::2], opts[1::2], strict=False)).get("IMPORTS", given)
    cfg.merge_from_list(["IMPORTS", given])
    check_rules(cfg, {"IMPORTS": TEXTS})
    return cfg.IMPORTS


def _import(name: str, folder: Path) -> None:
    path = folder / name
    if not name.endswith(".py"):
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"IMPORTS: {name!r} is neither a module's name nor a file that ends in .py")
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


def _names(node: _CfgNode, prefix: str = "") -> dict[str, bool]:
    """All keys below a node, and whether each is a node itself."""
    names = {}
    for key, value in node.items():
        names[prefix + key] = isinstance(value, _CfgNode)
        if names[prefix + key]:
            names |= _names(value, f"{prefix}{key}.")
    return names


def _check(
    node: _CfgNode, other: _CfgNode, known: dict[str, bool], listable: tuple[str, ...], path: tuple[str, ...] = ()
) -> None:
    for key, value in other.items():
        name = ".".join((*path, str(key)))
        if key not in node:
            if node.is_new_allowed():
                continue
            if known.get(name) is False:
                raise ConfigError(f"config key {name}: in a file its parts stand below each other, as {_nested(name)}")
            raise ConfigError(_unknown(name, value, known))
        mine = node[key]
        other[key] = fit(name, value, mine, listable=name in listable)
        if isinstance(mine, _CfgNode):
            other[key] = _node(type(other), other[key])
            _check(mine, other[key], known, listable, (*path, key))
        elif name in listable:
            # yacs lets no value change its type: give the old one the type of the new.
            node[key] = type(as_kind(other[key], (str, list, tuple)))()


def _unknown(name: str, value: Any, known: dict[str, bool]) -> str:
    # A command line names one key, in a node in a node.
    while isinstance(value, _CfgNode) and len(value) == 1:
        ((key, value),) = value.items()
        name = f"{name}.{key}"
    alike = [other for other, is_node in known.items() if is_node == isinstance(value, _CfgNode)]
    return f"unknown config key {name}{did_you_mean(name, alike)}"


def _node(kind: type[_CfgNode], settings: dict[str, Any]) -> _CfgNode:
    try:
        return kind(settings)
    except AssertionError as error:
        raise ConfigError(f"settings are text, numbers, True or False, and lists of them: {error}") from error


def _nested(name: str) -> str:
    first, *rest = name.split(".")
    return f"{first}: {{{_nested('.'.join(rest))}}}" if rest else f"{first}: ..."
