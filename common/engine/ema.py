"""Exponential moving average of the student, evaluated and saved beside the live one."""

from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class EMAHook(HookBase):
    """Keeps torch's AveragedModel of the deployed student up to date after every step.

    Args:
        student: returns the network that is averaged; it may be built anew at each call, with the same parameters.
        decay: of the average; buffers (batch norm statistics) are averaged as well.
    """

    def __init__(self, student: Callable[[], nn.Module], decay: float) -> None:
        self._student = student
        self.averaged = AveragedModel(student(), multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.averaged.requires_grad_(False)

    @property
    def network(self) -> nn.Module:
        """The averaged student."""
        return self.averaged.module

    def after_step(self) -> None:
        self.averaged.update_parameters(self._student())

    def state_dict(self) -> dict[str, Any]:
        return self.averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averaged.load_state_dict(state)
