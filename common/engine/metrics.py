"""Means of the losses since the last log line, kept on the device until they are logged."""

import math

import torch
from torch import Tensor

__all__ = ["MeanMetrics", "average_states"]


class MeanMetrics:
    """Running means of 0-d tensors. No value leaves the device before :meth:`compute`.

    Its state goes into the checkpoint, so that a resumed run logs what an unbroken one would.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def update(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def compute(self) -> dict[str, float]:
        """Means over the steps since the last reset.

        Raises:
            FloatingPointError: a mean is not finite.
        """
        means = {name: total.item() / self._count for name, total in self._sums.items()}
        if not all(math.isfinite(value) for value in means.values()):
            raise FloatingPointError(
                f"a loss became infinite or NaN within the last {self._count} steps: {means}. Lower SOLVER.BASE_LR, "
                "warm up, or clip gradients; `--resume` goes on from the last checkpoint, which is finite"
            )
        return means

    def reset(self) -> None:
        self._sums, self._count = {}, 0

    def state_dict(self) -> dict[str, object]:
        return {"sums": {name: total.cpu() for name, total in self._sums.items()}, "count": self._count}

    def load_state_dict(self, state: dict) -> None:
        self._sums, self._count = dict(state["sums"]), state["count"]


def average_states(states: list[dict]) -> dict:
    """The average of several processes' states."""
    sums = {name: sum(state["sums"][name] for state in states) / len(states) for name in states[0]["sums"]}
    return {"sums": sums, "count": states[0]["count"]}
