"""The folder in which Detectron2, and both tasks here, look for data sets."""

import os
from pathlib import Path

ROOT_VARIABLE = "DETECTRON2_DATASETS"


def data_path(path: str | os.PathLike = "", root: str | os.PathLike = "") -> Path:
    """Absolute form of `path` in `root`, which is DETECTRON2_DATASETS if empty, or else ./datasets; expands ``~``."""
    root = Path(root or os.environ.get(ROOT_VARIABLE) or "datasets").expanduser()
    return Path(os.path.abspath(root / Path(path).expanduser()))
