"""The folder in which Detectron2 looks for data sets."""

import os
from pathlib import Path

__all__ = ["ROOT_VARIABLE", "data_path"]

ROOT_VARIABLE = "DETECTRON2_DATASETS"


def data_path(path: str | os.PathLike = "") -> Path:
    """Absolute path of what is in DETECTRON2_DATASETS, or where that is not set in ./datasets; ~ is expanded."""
    root = Path(os.environ.get(ROOT_VARIABLE) or "datasets").expanduser()
    return Path(os.path.abspath(root / Path(path).expanduser()))
