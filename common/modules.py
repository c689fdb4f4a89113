"""Looking into networks, and networks that share their parameters with others; needs torch only."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["MODULE_PREFIX", "ModuleCall", "capture_calls", "captured_extras", "shared_copy"]

#: How a method names the output of a submodule among its needs: ``module:layer3.0.conv1``.
MODULE_PREFIX = "module:"


@dataclass
class ModuleCall:
    """Arguments and result of a call of a module."""

    args: tuple
    output: Any


@contextmanager
def capture_calls(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[ModuleCall]]]:
    """Record the calls of modules within the block, under the names given, in their order."""
    calls: dict[str, list[ModuleCall]] = {name: [] for name in modules}
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: calls[name].append(ModuleCall(args, output)))
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def captured_extras(network: nn.Module, needs: Iterable[str]) -> Iterator[dict[str, Tensor | list[Tensor]]]:
    """`Outputs.extras` for the needs ``module:NAME``, filled when the block ends: outputs of these submodules.

    A submodule that is called several times gives a list.

    Raises:
        AttributeError: the network has no such submodule.
        ValueError: it did not call it.
    """
    named = {need: need.removeprefix(MODULE_PREFIX) for need in needs if need.startswith(MODULE_PREFIX)}
    extras: dict[str, Tensor | list[Tensor]] = {}
    with capture_calls({need: network.get_submodule(name) for need, name in named.items()}) as calls:
        yield extras
    for need, made in calls.items():
        if not made:
            raise ValueError(f"{type(network).__name__} did not call its submodule {named[need]}")
        extras[need] = made[0].output if len(made) == 1 else [call.output for call in made]


def shared_copy(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    """A module of the same class with the same parameters, but for some submodules.

    Args:
        module: stays as it is.
        children: what takes the place of each submodule, by its dotted name; None removes it.
    """
    twin = copy.copy(module)
    # A shallow copy shares the table of submodules, which torch makes public in no other way.
    twin._modules = dict(module._modules)
    for name, child in children.items():
        first, _, rest = name.partition(".")
        setattr(twin, first, shared_copy(getattr(twin, first), {rest: child}) if rest else child)
    return twin
