"""What holds for a teacher whatever the task: frozen, in eval mode, in no checkpoint."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2distill.common.distillers import Distiller

__all__ = ["batch_statistics", "exclude_teacher_from_state_dict", "passes", "teaching"]

_PREFIX = "teacher."


def exclude_teacher_from_state_dict(model: nn.Module) -> None:
    """Make ``model.state_dict()`` end without, and ``model.load_state_dict()`` expect nothing of, ``model.teacher``."""
    model.register_state_dict_post_hook(_drop)
    model.register_load_state_dict_post_hook(_expect_none)


def _drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in [name for name in state if name.startswith(prefix + _PREFIX)]:
        del state[name]


def _expect_none(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.startswith(_PREFIX)]


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Within the block the network's batch norms use the batch's statistics and leave their running ones alone."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for norm, (training, track) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, track


def passes(distillers: Iterable[Distiller]) -> list[bool]:
    """The forward passes that methods ask of a teacher, each once: whether with the batch's statistics.

    A method that wants those changes nothing for the others, at the price of a second pass where there are others.
    """
    return sorted({distiller.teacher_batch_statistics for distiller in distillers if distiller.needs_teacher})


def teaching(network: nn.Module, by_batch: bool) -> AbstractContextManager[None]:
    """The context of such a pass."""
    return batch_statistics(network) if by_batch else nullcontext()
