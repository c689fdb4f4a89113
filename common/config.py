"""The DISTILL node, made of every registered method's own defaults, and how a configuration is read.

The methods, and torch with them, are imported where they are needed: a wrong key is answered before that.
"""

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from fvcore.common.config import CfgNode as _CfgNode

from d2distill.common.config_node import CfgNode, CheckedMerge, absolute_file, load_yaml
from d2distill.common.errors import ConfigError, did_you_mean
from d2distill.common.foreign import is_of_mdistiller
from d2distill.common.rules import LIST_OF_STR, check_rules

if TYPE_CHECKING:
    import torch

    from d2distill.common.distillers import Distiller

_FILES = iter_modules([str(Path(__file__).with_name("distillers"))])
#: Nodes that can be checked once the methods are there; also their own names, which MDistiller has at the top.
_OF_METHODS = {"DISTILL", "TEACHER", *(file.name.upper() for file in _FILES)}
#: Names of the modules that IMPORTS named: of files with their path, else of the package.
EXTENSIONS: set[str] = set()
__all__ = ["CfgNode", "CheckedMerge", "add_distill_defaults", "chosen_methods", "read_cfg", "resolve_device"]


def add_distill_defaults(cfg: _CfgNode) -> None:
    """Add the node DISTILL to `cfg`: METHODS, CE_WEIGHT, and one node per registered method."""
    from d2distill.common.distillers import DISTILLERS

    _add_distill_node(cfg)
    node = cfg.DISTILL
    for name, method in DISTILLERS:
        if name.upper() in node:  # names that differ in case alone would share their settings
            raise ConfigError(f"method {name} ({method.__module__}): DISTILL.{name.upper()} is taken; rename the class")
        node[name.upper()] = type(cfg)({**method.common_defaults(), **method.defaults()})


def _add_distill_node(cfg: _CfgNode) -> None:
    node = cfg.DISTILL = type(cfg)()
    # Any number of registered methods at once; an empty list is plain training.
    node.METHODS = []
    # Weight of the task's own cross-entropy (classification).
    node.CE_WEIGHT = 1.0


def chosen_methods(cfg: _CfgNode) -> "dict[str, type[Distiller]]":
    """The methods of DISTILL.METHODS by name.

    Raises:
        ConfigError: no list of names, an unknown method, or one that is named twice.
    """
    from d2distill.common.distillers import DISTILLERS

    check_rules(cfg, {LIST_OF_STR: ["DISTILL.METHODS"]})
    for name in cfg.DISTILL.METHODS:
        if name not in DISTILLERS:
            known = sorted(name for name, _ in DISTILLERS)
            raise ConfigError(
                f"DISTILL.METHODS: no method {name}{did_you_mean(name, known)}; there are {', '.join(known)}"
            )
    if len(set(cfg.DISTILL.METHODS)) < len(cfg.DISTILL.METHODS):
        raise ConfigError(f"DISTILL.METHODS names a method twice: {list(cfg.DISTILL.METHODS)}")
    return {name: DISTILLERS.get(name) for name in cfg.DISTILL.METHODS}


def read_cfg(
    own_cfg: Callable[[], _CfgNode],
    add_methods: Callable[[_CfgNode], None],
    config_file: str,
    opts: Sequence[Any] | None,
) -> _CfgNode:
    """Defaults, then a YAML file with its ``_BASE_`` files, then ``KEY VALUE`` pairs.

    Paths of files that exist become absolute, and so do OUTPUT_DIR (empty: named after the file) and the report's
    baseline, so that the run folder's copy of the configuration loads from anywhere.

    Args:
        own_cfg: the defaults but for the methods', with nodes of :class:`CheckedMerge`.
        add_methods: adds those.

    Raises:
        ConfigError: an unknown key (named with the nearest known ones), a value of another type, or a faulty file.
        FileNotFoundError: no such file.
    """
    if config_file:
        if not os.path.exists(config_file):
            raise FileNotFoundError(f"--config-file {config_file}: no such file (looked in {Path.cwd()})")
        if is_of_mdistiller(load_yaml(config_file)):
            raise ConfigError(
                f"{config_file} is a configuration of MDistiller: `d2distill-convert-config {config_file} -o "
                "FILE.yaml` writes it as one of d2distill"
            )
    # Mistakes outside the methods' settings are reported first: importing the methods takes seconds.
    cfg = own_cfg()
    _add_distill_node(cfg)
    cfg.pass_over(_OF_METHODS)
    _merge(cfg, config_file, opts)
    check_rules(cfg, {LIST_OF_STR: ["IMPORTS"]})
    imports = [absolute_file(name, os.path.dirname(config_file)) for name in cfg.IMPORTS]
    # The user's own methods have settings too.
    import_extensions(imports)
    cfg = own_cfg()
    add_methods(cfg)
    _merge(cfg, config_file, opts)
    cfg.IMPORTS = imports
    output = cfg.OUTPUT_DIR or os.path.join("output", Path(config_file).stem or "run")
    cfg.OUTPUT_DIR = os.path.abspath(os.path.expanduser(output))
    if "REPORT" in cfg and cfg.REPORT.BASELINE:
        cfg.REPORT.BASELINE = os.path.abspath(os.path.expanduser(cfg.REPORT.BASELINE))
    return cfg


def _merge(cfg: _CfgNode, config_file: str, opts: Sequence[Any] | None) -> None:
    if config_file:
        cfg.merge_from_file(config_file)
    cfg.merge_from_list(list(opts or []))


def import_extensions(names: Iterable[str]) -> None:
    """Import what a configuration's IMPORTS names, modules or files, each once in a process."""
    for name in names:
        # A file has its path as its name, so that a second config of the same process does not run it again.
        path = os.path.realpath(name)
        module_name = f"imported_by_config_{path}"
        try:
            if not name.endswith(".py"):
                EXTENSIONS.add(name.partition(".")[0])
                importlib.import_module(name)
            elif module_name not in sys.modules:
                EXTENSIONS.add(module_name)
                spec = importlib.util.spec_from_file_location(module_name, path)
                sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # a script's sys.exit() would end the run silently
            sys.modules.pop(module_name, None)
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
            where = f"{name}, line {lines[-1]}" if lines else name
            raise ConfigError(f"IMPORTS: {where}: {type(error).__name__}: {error}") from error


def resolve_device(cfg: _CfgNode) -> "torch.device":
    """The device of MODEL.DEVICE; "auto" is the GPU if there is one. A ConfigError, if it is not here."""
    import torch

    name = cfg.MODEL.DEVICE
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"MODEL.DEVICE {name}: {str(error).splitlines()[0]}; use cpu, cuda or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"MODEL.DEVICE is {device}, but this machine has {torch.cuda.device_count()} GPUs; use cpu or auto"
        )
    return device
