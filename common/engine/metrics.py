"""Means of what was seen since the last log line, kept on the device until they are logged."""

from collections.abc import Mapping

import torch
from torch import Tensor


class MeanMetrics:
    """Running means of 0-d tensors, each over the steps that had it. No value leaves the device before `compute()`.

    Its state goes into the checkpoint, so that a resumed run logs what an unbroken one would.
    """

    def __init__(self) -> None:
        self.reset()

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value).detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def compute(self) -> dict[str, float]:
        """Means since the last reset."""
        return {name: total.item() / self._counts[name] for name, total in self._sums.items()}

    def reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def state_dict(self) -> dict[str, dict]:
        return {"sums": {name: total.cpu() for name, total in self._sums.items()}, "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])


class FirstFailure:
    """What was the first to be not finite: a network's outputs, or a loss of finite ones. Kept on the device."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._code: Tensor | None = None  # 0, or 1 + the position in the names

    @torch.no_grad()
    def update(self, finite_outputs: Mapping[str, Tensor | None], losses: Mapping[str, Tensor]) -> None:
        """Whether each network's outputs were finite, in the order in which they are to be named, and the losses."""
        known = {f"the {name}'s outputs": finite for name, finite in finite_outputs.items() if finite is not None}
        known |= {name: loss.isfinite() for name, loss in losses.items()}
        self._names, failed = list(known), ~torch.stack([finite.reshape(()) for finite in known.values()])
        code = torch.where(failed.any(), 1 + failed.int().argmax(), 0)
        self._code = code if self._code is None else torch.where(self._code == 0, code, self._code)

    def source(self) -> str:
        """Its name; empty if all has been finite. Waits for the device."""
        code = 0 if self._code is None else int(self._code)
        return self._names[code - 1] if code else ""
