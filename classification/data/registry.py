"""A registry whose names are chosen by the caller and whose errors propose the nearest known names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fvcore.common.registry import Registry

from d2distill.common.errors import did_you_mean

T = TypeVar("T")


class NamedRegistry(Registry):
    """fvcore's Registry for objects that are known by another name than their ``__name__``.

    Args:
        kind: what the registry holds, in words for error messages ("data set").
    """

    def register_as(self, name: str) -> Callable[[T], T]:
        """Decorator that registers what it decorates under ``name``.

        Raises:
            ValueError: the name is taken (a silent replacement would change what a configuration means).
        """

        def decorator(obj: T) -> T:
            if name in self:
                raise ValueError(f"a {self._name} named {name!r} is registered already")
            self._do_register(name, obj)
            return obj

        return decorator

    def get(self, name: str) -> Any:
        """The object registered under ``name``.

        Raises:
            ValueError: unknown name; the message lists the nearest known names, then all of them.
        """
        if name in self:
            return super().get(name)
        hint = did_you_mean(str(name), self.names())
        raise ValueError(f"unknown {self._name} {name!r}{hint}; known: {', '.join(self.names())}")

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(name for name, _ in self)
