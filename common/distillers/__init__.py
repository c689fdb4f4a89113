"""One file per method: its pure loss function, its `Distiller` class, its config defaults.

Every module of this folder is imported here, so that a new file is a new method: its class registers itself
in `DISTILLERS`, and what its ``__all__`` names can be imported from this package. A file anywhere else does
the same once it is imported (the config key IMPORTS).
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
