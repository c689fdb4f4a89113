"""What can be wrong with a YAML file of settings, said in one line with the file, the line and the key."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import yaml
from fvcore.common.config import BASE_KEY

from d2distill.common.errors import ConfigError

__all__ = ["check_tree", "reading"]

#: The file that is being read and those that led to it by their ``_BASE_``, outermost first.
_FILES: ContextVar[tuple[str, ...]] = ContextVar("_FILES", default=())
_TAG = "tag:yaml.org,2002:"
#: Types of YAML that no setting has; a date is easily written by accident.
_ODD = {_TAG + kind for kind in ("timestamp", "binary", "set", "omap", "pairs")}


@contextmanager
def reading(filename: str) -> Iterator[None]:
    """Around the reading of one file, its ``_BASE_`` files included: faults of files become errors for the user.

    Raises:
        ConfigError: no text, no YAML, YAML that would run code, a base that is missing or leads back to itself.
        FileNotFoundError: the outermost file is missing.
    """
    outer = _FILES.get()
    where = f"{filename} (_BASE_ of {outer[-1]})" if outer else str(filename)
    if os.path.realpath(filename) in map(os.path.realpath, outer):
        raise ConfigError(f"{outer[0]}: _BASE_ goes round in a circle: {' -> '.join((*outer, filename))}")
    token = _FILES.set((*outer, str(filename)))
    try:
        yield
    except ConfigError:
        raise
    except FileNotFoundError:
        if not outer:
            raise
        raise ConfigError(f"{where}: no such file; the path is relative to the file that names it") from None
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is no text in UTF-8 (byte {error.start}): is it a YAML file?") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}{_explain(error)}") from error
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply") from None
    except AssertionError as error:  # fvcore's
        raise ConfigError(f"{where}: {error} There it is no node with keys below it, as here") from error
    except ValueError as error:  # PyYAML's, for the like of `!!int many`
        raise ConfigError(f"{where}: {error}") from error
    finally:
        _FILES.reset(token)


def check_tree(text: str) -> bool:
    """Check what PyYAML lets pass: keys that are there twice or are no text, a value that no setting can be.

    Returns:
        Whether there are any settings: a file may be empty, or hold comments alone.

    Raises:
        yaml.YAMLError: with the place.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None or root.tag == _TAG + "null":
        return False
    if not isinstance(root, yaml.MappingNode):
        found = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise _fault(root, f"settings are lines of `KEY: value`, but this is {found}")
    _check_node(root, (), ())
    for key, value in root.value:
        files = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if key.value == BASE_KEY and any(file.tag != _TAG + "str" for file in files):
            raise _fault(value, f"{BASE_KEY} takes the path of a file, or a list of them")
    return True


def _check_node(node: yaml.Node, path: tuple[str, ...], above: tuple[yaml.Node, ...]) -> None:
    name = ".".join(path)
    if node in above:
        raise _fault(node, f"{name} holds itself")
    if node.tag in _ODD:
        raise _fault(node, f"{name}: to YAML this is a {node.tag.removeprefix(_TAG)}; quotes make it text")
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_node(value, path, (*above, node))
    if not isinstance(node, yaml.MappingNode):
        return
    first = {}
    for key, value in node.value:
        if key.tag == _TAG + "merge":
            continue
        if key.tag != _TAG + "str":
            raise _fault(key, f"key {_short(key)} is no text; quotes make it text")
        name = ".".join((*path, key.value))
        if key.value in first:
            raise _fault(key, f"{name} is there twice, first in line {first[key.value]}: make them one")
        first[key.value] = key.start_mark.line + 1
        _check_node(value, (*path, key.value), (*above, node))


def _short(node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else f"(a {node.id})"


def _fault(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _explain(error: yaml.YAMLError) -> str:
    """Where in the file, and what: the end of the sentence that begins with the file."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return f" is no YAML: {' '.join(str(error).split())}"
    place = f", line {mark.line + 1}: "
    if isinstance(error, yaml.constructor.ConstructorError):
        return place + ("YAML that would run code: " if f"{_TAG}python/" in problem else "") + problem
    if type(error) is yaml.MarkedYAMLError:  # one of ours
        return place + problem
    start = f" {error.context} of line {error.context_mark.line + 1}," if error.context_mark else ""
    syntax = isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError)
    hint = " (spaces indent, keys of one node alike; brackets and quotes are closed)" * syntax
    return f"{place}this is no YAML:{start} {problem}{hint}"
