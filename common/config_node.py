"""A CfgNode that says in one line what is wrong with a file, a key or a value."""

import math
import os
from ast import literal_eval
from collections.abc import Callable, Container, Iterator, Mapping
from typing import IO, Any

import yaml
from fvcore.common.config import BASE_KEY
from fvcore.common.config import CfgNode as _CfgNode

from d2distill.common.errors import ConfigError, did_you_mean
from d2distill.common.files import regular_file
from d2distill.common.foreign import our_key, similar_key
from d2distill.common.rules import STR_OR_LIST
from d2distill.configs import find_config


class CheckedMerge:
    """Mix-in for fvcore's and Detectron2's CfgNode: strict merging, and YAML that runs no code.

    A value takes the type of its setting, however it is written (:func:`coerce`). What is wrong is a ConfigError.
    """

    #: Keys that take a string or a list of strings.
    LISTABLE: tuple[str, ...] = ()
    _passed_over: Container[str] = ()

    def pass_over(self, nodes: Container[str]) -> None:
        """Neither check nor merge nodes of these names at the top."""
        # Past yacs, which takes an attribute for a key.
        object.__setattr__(self, "_passed_over", nodes)

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """:func:`load_yaml`."""
        return load_yaml(filename)

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file with its ``_BASE_`` files."""
        settings = load_yaml(cfg_filename)
        try:
            self.merge_from_other_cfg(settings)
        except ConfigError as error:
            raise ConfigError(f"{cfg_filename}: {error}") from error

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        """Merge ``["KEY", value, ...]``, as a command line gives them."""
        if len(cfg_list) % 2:
            raise ConfigError(f"settings come as KEY VALUE pairs, but {cfg_list[-1]!r} has no value: {cfg_list}")
        for key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            for part in reversed(key.split(".")):
                value = {part: value}
            self.merge_from_other_cfg(value)

    def merge_from_other_cfg(self, cfg_other: Mapping[str, Any]) -> None:
        """Merge another node, or nested dicts."""
        _merge(self, {key: value for key, value in cfg_other.items() if key not in self._passed_over}, self)


class CfgNode(CheckedMerge, _CfgNode):
    """fvcore's CfgNode (yacs with ``_BASE_`` files) with strict merging."""


def _merge(node: _CfgNode, settings: Mapping[str, Any], root: _CfgNode, prefix: str = "") -> None:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(node.get(key), _CfgNode):
            below = parse_as(value, (dict,))
            if below is None:
                raise ConfigError(f"config key {name} is a node with keys below it, but was given {_shown(value)}")
            _merge(node[key], below, root, f"{name}.")
        elif key in node:
            node[key] = coerce(name, value, node[key], listable=name in root.LISTABLE)
        elif node.is_new_allowed():
            below = parse_as(value, (dict,))
            node[key] = value if below is None else type(root)(below, new_allowed=True)
        elif "." in str(key):
            first, _, rest = key.partition(".")
            raise ConfigError(f"config key {name}: in a file its parts are nested, as {first}: {{{rest}: ...}}")
        else:
            raise _unknown_key(name, value, root)


def _unknown_key(name: str, value: Any, root: _CfgNode) -> ConfigError:
    # A command line names one key, in a node in a node.
    while isinstance(value, dict) and len(value) == 1:
        ((key, value),) = value.items()
        name = f"{name}.{key}"
    methods = {key: node for key, node in root.get("DISTILL", {}).items() if isinstance(node, dict)}
    if ours := our_key(name, methods):
        return ConfigError(f"unknown config key {name}, which is MDistiller's: here it is {ours}")
    hint = f" (did you mean {similar}?)" if (similar := similar_key(name)) else did_you_mean(name, _all_keys(root))
    return ConfigError(f"unknown config key {name}{hint}")


def _all_keys(node: _CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, _CfgNode):
            yield from _all_keys(value, f"{prefix}{key}.")


_TYPE_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def coerce(name: str, value: Any, current: Any, listable: bool = False) -> Any:
    """`value` in the type of the setting's `current` value; of a `listable` one a list or text."""
    if current is None:  # a setting of Detectron2 that takes any type
        return _read(value)
    alike = {list: (list, tuple), tuple: (list, tuple), float: (float, int)}.get(type(current), (type(current),))
    found = parse_as(value, (list, tuple, str) if listable else alike)
    if found is None:
        hint = "; put it in quotes" if isinstance(current, str) else f"; e.g. {current!r}"
        if isinstance(current, list | tuple):  # one value in place of a list is the usual mistake
            hint = f"; write [{str(value).strip('[](), ')}], or [] for none"
        wanted = _TYPE_NAMES.get(type(current), "a list") + " or a list" * listable
        raise ConfigError(f"{name} takes {wanted}, but was given {_shown(value)}{hint}")
    if isinstance(current, tuple) and current and isinstance(current[0], tuple):
        if not all(isinstance(entry, list | tuple) for entry in found):
            raise ConfigError(f"{name} takes a list of lists, but was given {_shown(value)}; e.g. {current!r}")
        return tuple(map(tuple, found))  # YAML has no tuples
    return found if listable else type(current)(found)


def parse_as(value: Any, types: tuple[type, ...]) -> Any:
    """`value` as the first of `types` that it can be read as, None if there is none.

    Text is read as Python writes the type, then as YAML does, then as it is.
    """
    for kind in types:
        # YAML's numbers are not all Python's: to it 010 is 8, and 1:30 is 90.
        by_yaml = value if kind in (int, float) else _read(value, parse_yaml)
        for reading in (_read(value), by_yaml, value):
            # Not isinstance, to which True is an int.
            if type(reading) is kind or (kind is dict and isinstance(reading, dict)):
                return reading
    return None


def _read(value: Any, reader: Callable[[str], Any] = literal_eval) -> Any:
    try:
        return reader(value) if isinstance(value, str) else value
    except Exception:  # text that is no value: parsers raise nearly anything
        return value


def _shown(value: Any) -> str:
    return "nothing" if value is None else value if isinstance(value, str) and value else repr(value)


def load_yaml(filename: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings of a YAML file over those of its ``_BASE_`` files.

    Files that it names in IMPORTS, TEACHER.CONFIG_FILE and DATASETS.CLASSES become absolute here, where their folder is
    known. A ``_BASE_`` that is not beside the file may be one of d2distill's configs, e.g. ``cls/base_cifar100.yaml``.
    `above` are the files that led here by their ``_BASE_``, outermost first.
    """
    where = f"{filename} (_BASE_ of {above[-1]})" if above else filename
    if os.path.realpath(filename) in map(os.path.realpath, above):
        raise ConfigError(f"{where}: _BASE_ goes round in a circle: {' -> '.join((*above, filename))}")
    try:
        with open(regular_file(filename), encoding="utf-8") as file:
            settings = parse_yaml(file) or {}
    except Exception as error:  # of a damaged file: nearly anything
        own = isinstance(error, OSError | UnicodeDecodeError | yaml.YAMLError)
        reason = getattr(error, "strerror", "") or " ".join(str(error).split())
        raise ConfigError(
            f"{where} cannot be read as YAML: {reason if own else f'{type(error).__name__}: {reason}'}"
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: settings are lines of `KEY: value`, but this is a {type(settings).__name__}")
    folder = os.path.dirname(filename)
    if isinstance(settings.get("IMPORTS"), list):
        settings["IMPORTS"] = [absolute_file(name, folder) for name in settings["IMPORTS"]]
    for name, key in (("TEACHER", "CONFIG_FILE"), ("DATASETS", "CLASSES")):
        node = settings.get(name)
        if isinstance(node, dict) and key in node:
            node[key] = absolute_file(node[key], folder)
    bases, merged = settings.pop(BASE_KEY, None) or [], {}
    if not STR_OR_LIST.predicate(bases):
        raise ConfigError(f"{where}: {BASE_KEY} must be a file, or a list of files, but is {bases!r}")
    for base in [bases] if isinstance(bases, str) else bases:
        file = os.path.join(folder, os.path.expanduser(base))
        if not os.path.exists(file) and (packaged := find_config(base)) != base:
            file = packaged
        overlay(merged, load_yaml(file, (*above, filename)))
    overlay(merged, settings)
    return merged


def absolute_file(path: Any, *folders: str) -> Any:
    """Absolute form of a file's path, looked for in `folders`, then in the working directory; else as it is."""
    for folder in (*folders, ""):
        if isinstance(path, str) and os.path.isfile(file := os.path.join(folder, os.path.expanduser(path))):
            return os.path.abspath(file)
    return path


def overlay(settings: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Put nested settings over others, in place."""
    for key, value in other.items():
        if isinstance(value, dict):
            if not isinstance(settings.get(key), dict):
                settings[key] = {}
            overlay(settings[key], value)
        else:
            settings[key] = value


def parse_yaml(stream: str | IO[str]) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: it is no YAML, a key is there twice, or its aliases add up to more than is sensible.
        Exception: of values that are not what they are tagged as, or of too many levels: nearly anything.
    """
    return yaml.load(stream, _Loader)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses what YAML takes: the last of two equal keys, and aliases of aliases without limit."""

    #: Values of a text, those of an alias counted wherever it stands: ten lines can have 10**10.
    MOST = 100_000

    def __init__(self, stream: str | IO[str]) -> None:
        super().__init__(stream)
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if not alias:
            parts = () if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in parts for part in pair]
            self._sizes[node] = 1 + sum(self._sizes[part] for part in parts)
        # The size of a node that holds itself is not known yet.
        if self._sizes.get(node, math.inf) > self.MOST:
            problem = f"with its aliases it has more than {self.MOST} values"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            first = lines.setdefault(str(key.value), key.start_mark)
            if first is not key.start_mark:
                problem = f"{key.value} is there twice, first in line {first.line + 1}"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return node
