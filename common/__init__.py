"""The distillation core: tensors in, losses out. Knows no data set and no detector."""

from importlib import import_module


def __getattr__(name: str):
    if name == "distillers":  # on use: it imports torch
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
