"""Figures of runs, as matplotlib's; :mod:`d2distill.tools.visualize` is their command line.

Each takes run folders: ``curves_figure, tsne_figure, correlation_figure, confusion_figure, attention_figure,
detections_figure``; :func:`~d2distill.tools.visualizations.style.save_figure` writes one.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "curves_figure": "curves",
    "tsne_figure": "features",
    "correlation_figure": "features",
    "confusion_figure": "features",
    "attention_figure": "attention",
    "detections_figure": "detections",
    "save_figure": "style",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    # On first use: torch and Detectron2 take seconds.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
