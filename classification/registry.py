"""fvcore's Registry for data sets, augmentations and models, which have names of their own."""

from collections.abc import Callable
from typing import Any

from fvcore.common.registry import Registry

from d2distill.common.errors import did_you_mean

__all__ = ["NamedRegistry"]


class NamedRegistry(Registry):
    """A Registry whose names the caller chooses; `kind` says in errors what it holds ("data set")."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind

    def register_as(self, name: str) -> Callable[[Any], Any]:
        """Decorator that registers what it decorates under `name`, which must not be taken."""

        def decorator(obj: Any) -> Any:
            self._do_register(name, obj)
            return obj

        return decorator

    def get(self, name: str) -> Any:
        """What is registered under `name`; the ValueError for an unknown one proposes the nearest."""
        if name not in self:
            names = self.names()
            raise ValueError(f"unknown {self.kind} {name!r}{did_you_mean(name, names)}; known: {', '.join(names)}")
        return super().get(name)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(name for name, _ in self)
