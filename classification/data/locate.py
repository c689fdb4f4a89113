"""Where the files of a data set are, and what to say when they are not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .datasets import DatasetInfo

ROOT_VARIABLE = "DETECTRON2_DATASETS"


def dataset_root(root: str | os.PathLike = "") -> str:
    """Absolute path of ``root``, or if empty of what DETECTRON2_DATASETS names, or else of "datasets"."""
    return os.path.abspath(os.path.expanduser(os.fspath(root) or os.environ.get(ROOT_VARIABLE) or "datasets"))


def find_folder(info: DatasetInfo, root: str, folders: Sequence[str], missing: Callable[[Path], Sequence[str]]) -> Path:
    """The first complete one of ``folders``.

    Args:
        folders: relative to ``root`` or absolute, in the order in which they are looked at; "" is ``root`` itself.
        missing: folder -> the paths in it that are needed and not there (empty when complete).

    Raises:
        FileNotFoundError: none is complete. The message lists what was missed, how to get it, how to point to it.
    """
    looked_at = []
    for folder in folders:
        candidate = Path(root, folder)
        absent = missing(candidate)
        if not absent:
            return candidate
        looked_at += [str(candidate / path) for path in absent]
    lines = "\n".join(f"  {path}" for path in looked_at)
    raise FileNotFoundError(
        f"data set {info.name!r} not found. Not there:\n{lines}\n"
        f"To get it: {info.source.replace('ROOT', root)}\n"
        f"If you have it elsewhere, set DATASETS.ROOT (or the environment variable {ROOT_VARIABLE}) to the folder "
        "that holds it."
    )
