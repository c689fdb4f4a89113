"""The DISTILL node, made of every registered method's own defaults, and how a configuration is read."""

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode as _CfgNode

from d2distill.common.config_node import CfgNode, CheckedMerge, absolute_file
from d2distill.common.distillers import DISTILLERS, Distiller
from d2distill.common.errors import ConfigError, did_you_mean
from d2distill.common.foreign import is_of_mdistiller
from d2distill.common.rules import LIST_OF_STR, check_rules

__all__ = ["CfgNode", "CheckedMerge", "add_distill_defaults", "chosen_methods", "read_cfg", "resolve_device"]


def add_distill_defaults(cfg: _CfgNode) -> None:
    """Add the node DISTILL to `cfg`: METHODS, CE_WEIGHT, and one node per registered method."""
    node = type(cfg)()
    # Any number of registered methods at once; an empty list is plain training.
    node.METHODS = []
    # Weight of the task's own cross-entropy (classification).
    node.CE_WEIGHT = 1.0
    for name, method in DISTILLERS:
        if name.upper() in node:  # names that differ in case alone would share their settings
            raise ConfigError(f"method {name} ({method.__module__}): DISTILL.{name.upper()} is taken; rename the class")
        node[name.upper()] = type(cfg)({**method.common_defaults(), **method.defaults()})
    cfg.DISTILL = node


def chosen_methods(cfg: _CfgNode) -> dict[str, type[Distiller]]:
    """The methods of DISTILL.METHODS by name.

    Raises:
        ConfigError: no list of names, an unknown method, or one that is named twice.
    """
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


def read_cfg(get_cfg: Callable[[], _CfgNode], config_file: str, opts: Sequence[Any] | None) -> _CfgNode:
    """Defaults, then a YAML file with its ``_BASE_`` files, then ``KEY VALUE`` pairs.

    Paths of files that exist become absolute, and so do OUTPUT_DIR (empty: named after the file) and the report's
    baseline, so that the run folder's copy of the configuration loads from anywhere.

    Args:
        get_cfg: the defaults, with nodes of :class:`CheckedMerge`.

    Raises:
        ConfigError: an unknown key (named with the nearest known ones), a value of another type, or a faulty file.
        FileNotFoundError: no such file.
    """
    opts = list(opts or [])
    cfg, given = get_cfg(), {}
    if config_file:
        if not os.path.isfile(config_file):
            raise FileNotFoundError(f"--config-file {config_file}: no such file (looked in {Path.cwd()})")
        given = cfg.load_yaml_with_base(config_file)
        if is_of_mdistiller(given):
            raise ConfigError(
                f"{config_file} is a configuration of MDistiller: `d2distill-convert-config {config_file} -o "
                "FILE.yaml` writes it as one of d2distill"
            )
    given |= dict(zip(opts[0::2], opts[1::2], strict=False))
    cfg.merge_from_list(["IMPORTS", given.get("IMPORTS", [])])
    check_rules(cfg, {LIST_OF_STR: ["IMPORTS"]})
    imports = [absolute_file(name, os.path.dirname(config_file)) for name in cfg.IMPORTS]
    import_extensions(imports)
    # Once more, now with the settings of the user's own methods.
    cfg = get_cfg()
    if config_file:
        cfg.merge_from_file(config_file)
    cfg.merge_from_list(opts)
    cfg.IMPORTS = imports
    output = cfg.OUTPUT_DIR or os.path.join("output", Path(config_file).stem or "run")
    cfg.OUTPUT_DIR = os.path.abspath(os.path.expanduser(output))
    if "REPORT" in cfg and cfg.REPORT.BASELINE:
        cfg.REPORT.BASELINE = os.path.abspath(os.path.expanduser(cfg.REPORT.BASELINE))
    return cfg


def import_extensions(names: Iterable[str]) -> None:
    """Import what a configuration's IMPORTS names, modules or files, each once in a process."""
    for name in names:
        # A file has its path as its name, so that a second config of the same process does not run it again.
        path = os.path.realpath(name)
        module_name = f"imported_by_config_{path}"
        try:
            if not name.endswith(".py"):
                importlib.import_module(name)
            elif module_name not in sys.modules:
                spec = importlib.util.spec_from_file_location(module_name, path)
                sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
        except Exception as error:
            sys.modules.pop(module_name, None)
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
            where = f"{name}, line {lines[-1]}" if lines else name
            raise ConfigError(f"IMPORTS: {where}: {type(error).__name__}: {error}") from error


def resolve_device(cfg: _CfgNode) -> torch.device:
    """The device of MODEL.DEVICE; "auto" is the GPU if there is one. A ConfigError, if it is not here."""
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
