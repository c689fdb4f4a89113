"""One file per method: its pure loss function, its `Distiller` class, its config defaults.

Every module of this folder is imported here, so that a new file is a new method: its class registers itself
in `DISTILLERS`, and what its ``__all__`` names can be imported from this package. A file anywhere else does
the same once it is imported (the config key IMPORTS).

What holds for every loss function: it returns a 0-d tensor in at least fp32; 0, with a graph, for an empty batch. It is
finite, with finite gradients, for logits of +-1e4. No gradient reaches the teacher, and nothing waits for the device.
Feature maps are listed from shallow to deep. Arguments that do not fit are a ValueError: lists of different length or
maps of different channels, where a function does not say that they may be, or fewer classes than it states.
"""

from importlib import import_module
from pkgutil import iter_modules

from d2distill.common.distillers.base import DISTILLERS, Distiller, LogitDistiller

__all__ = ["DISTILLERS", "Distiller", "LogitDistiller"]

for _info in iter_modules(__path__):
    _module = import_module(f"{__name__}.{_info.name}")
    for _name in getattr(_module, "__all__", ()):
        globals()[_name] = getattr(_module, _name)
        if _name not in __all__:
            __all__.append(_name)
