"""A training loop whose every step is a function of (seed, step): what both tasks train with."""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from torch import Tensor, nn

from common.engine.metrics import MeanMetrics

__all__ = ["StepTrainer", "seed_step"]


def seed_step(seed: int, step: int) -> None:
    """Seed Python, numpy and torch by (seed, step, rank).

    Done before every step, it makes dropout and the like continue after a restart as they would have without one,
    whatever evaluation, hooks or workers drew in between, and leaves no generator state to save.
    """
    low, high = np.random.SeedSequence([seed, step, comm.get_rank()], spawn_key=(1,)).generate_state(2)
    random.seed(int(low))
    np.random.seed(int(low))
    torch.manual_seed(int(high) << 32 | int(low))


class StepTrainer(TrainerBase):
    """Detectron2's TrainerBase with a step that is exact under restarts.

    Args:
        model: returns a dict of losses for ``model(*arguments(batch))`` in training mode.
        optimizer: over the trainable parameters of `model`.
        build_batches: called with the first step to do; returns the batches from that step on.
        seed: of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        build_batches: Callable[[int], Iterable[Any]],
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.build_batches = build_batches
        self.seed = seed
        self.metrics = MeanMetrics()
        self._batches: Iterator[Any]

    def before_train(self) -> None:
        super().before_train()
        self.model.train()
        self._batches = iter(self.build_batches(self.start_iter))

    def after_train(self) -> None:
        # Ends the loader's workers now, and not when the garbage collector finds the iterator.
        del self._batches
        super().after_train()

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        """What the model is called with for this batch."""
        return (batch,)

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._batches)
        self.storage.put_scalar("data_time", time.perf_counter() - start)
        seed_step(self.seed, self.iter)
        losses: dict[str, Tensor] = self.model(*self.arguments(batch))
        total = sum(losses.values())
        self.optimizer.zero_grad()
        total.backward()
        self.after_backward()
        self.optimizer.step()
        self.metrics.update({"total_loss": total, **losses})

    def log_metrics(self) -> None:
        """Put the losses' means since the last call, over all processes, into the event storage."""
        gathered = comm.gather(self.metrics.compute())
        self.metrics.reset()
        for name in gathered[0] if gathered else ():
            # They are means already: smoothing them once more would depend on when the run was restarted.
            self.storage.put_scalar(name, np.mean([m[name] for m in gathered]), smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict(), "metrics": self.metrics.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.metrics.load_state_dict(state_dict["metrics"])
