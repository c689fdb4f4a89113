"""Means of what was seen since the last log line, kept on the device until they are logged."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from d2distill.common.errors import DivergedError

__all__ = ["MeanMetrics", "average_states"]


class MeanMetrics:
    """Running means of 0-d tensors, each over the steps that had it. No value leaves the device before `compute()`.

    Its state goes into the checkpoint, so that a resumed run logs what an unbroken one would.

    Args:
        finite: whether a mean that is not finite is an error.
    """

    def __init__(self, finite: bool = True) -> None:
        self.finite = finite
        self.reset()

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value).detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def compute(self) -> dict[str, float]:
        """Means since the last reset.

        Raises:
            DivergedError: a mean is not finite, and is to be.
        """
        means = {name: total.item() / self._counts[name] for name, total in self._sums.items()}
        if self.finite and not all(math.isfinite(value) for value in means.values()):
            steps = max(self._counts.values())
            raise DivergedError(f"a loss became infinite or NaN within the last {steps} steps: {means}.")
        return means

    def reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def state_dict(self) -> dict[str, dict]:
        return {"sums": {name: total.cpu() for name, total in self._sums.items()}, "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])


def average_states(states: list[dict]) -> dict:
    """One state for several processes': of each mean the average over those that have it."""
    names = {name: None for state in states for name in state["sums"]}
    sums, counts = {}, {}
    for name in names:
        own = [state for state in states if name in state["sums"]]
        counts[name] = max(state["counts"][name] for state in own)
        means = [state["sums"][name] / state["counts"][name] for state in own]
        sums[name] = sum(means) / len(means) * counts[name]
    return {"sums": sums, "counts": counts}
