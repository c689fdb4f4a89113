"""A training loop whose every step is a function of (seed, step): what both tasks train with."""

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2distill.common.engine.checkpoint import assert_finite_tensors
from d2distill.common.engine.metrics import MeanMetrics, average_states
from d2distill.common.errors import DivergedError, UserError

__all__ = ["StepTrainer", "seed_step"]


def _is_no_users_error(record: logging.LogRecord) -> bool:
    return record.exc_info is None or not isinstance(record.exc_info[1], UserError)


# Detectron2 logs a traceback of whatever ends a training. What the user can mend needs one line: the caller's.
logging.getLogger(TrainerBase.__module__).addFilter(_is_no_users_error)


def seed_step(seed: int, step: int, rank: int | None = None) -> None:
    """Seed Python, numpy and torch by (seed, step, rank); without a rank, by this process's.

    Done before every step, it makes dropout and the like continue after a restart as they would have without one,
    whatever evaluation, hooks or workers drew in between, and leaves no generator state to save.
    """
    rank = comm.get_rank() if rank is None else rank
    low, high = np.random.SeedSequence([seed, step, rank], spawn_key=(1,)).generate_state(2)
    random.seed(int(low))
    np.random.seed(int(low))
    torch.manual_seed(int(high) << 32 | int(low))


class StepTrainer(TrainerBase):
    """Detectron2's TrainerBase with a step that is exact under restarts.

    Args:
        model: returns a dict of losses in training mode.
        optimizer: over the trainable parameters of `model`.
        build_batches: called with the first step to do; returns the batches from that step on.
        seed: of the run.
        precision: of autocast; None trains in fp32. torch.float16 comes with loss scaling.
        clip: largest norm of the gradient; 0 does not clip.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        build_batches: Callable[[int], Iterable[Any]],
        seed: int,
        precision: torch.dtype | None = None,
        clip: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.build_batches = build_batches
        self.seed = seed
        self.precision = precision
        self.clip = clip
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision is torch.float16)
        self.metrics = MeanMetrics()
        # Of what the model itself puts into the event storage.
        self.model_scalars = MeanMetrics(finite=False)
        self._metric_states: list[dict[str, Any]] = []
        self._batches: Iterator[Any] = iter(())

    def before_train(self) -> None:
        super().before_train()
        self.model.train()
        self._batches = iter(self.build_batches(self.start_iter))

    def after_train(self) -> None:
        # Ends the loader's workers now, and not when the garbage collector finds the iterator.
        self._batches = iter(())
        super().after_train()

    def run_step(self) -> None:
        self._metric_states = []
        start = time.perf_counter()
        batch = next(self._batches)
        self.storage.put_scalar("data_time", time.perf_counter() - start)
        seed_step(self.seed, self.iter)
        # In a storage of its own: the trainer's smooths over a window, which a restart would cut.
        autocast = torch.autocast(self.device.type, self.precision, enabled=self.precision is not None)
        # TorchScript computes another way from a function's second call on, which after a restart is another step's.
        # On GPUs, where the last bits are not promised, its speed goes first.
        scripted = torch.jit.optimized_execution(self.device.type != "cpu")
        with EventStorage(self.iter) as notes, autocast, scripted:
            try:
                losses = self.compute_losses(batch)
            except FloatingPointError as error:  # Detectron2's networks look at what they compute
                raise DivergedError(str(error)) from error
        self.model_scalars.update({name: value for name, (value, _) in notes.latest().items()})
        self.storage._vis_data += notes._vis_data
        self.storage._histograms += notes._histograms
        self.optimizer.zero_grad()
        self.backward(losses)
        self.after_backward()
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.metrics.update({"total_loss": sum(losses.values()), **losses})

    def compute_losses(self, batch: Any) -> dict[str, Tensor]:
        """The losses of a batch, whose sum is what this process descends on."""
        return self.model(batch)

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Put the gradients where the optimiser finds them."""
        self.scaler.scale(sum(losses.values())).backward()

    def log_metrics(self) -> None:
        """Put the means since the last call, over all processes, into the event storage."""
        notes = comm.all_gather(self.model_scalars.compute())
        gathered = [{**losses, **own} for losses, own in zip(self.gather_finite_means(), notes, strict=True)]
        self.metrics.reset()
        self.model_scalars.reset()
        for name in {name: None for means in gathered for name in means}:
            # They are means already: smoothing them once more would depend on when the run was restarted.
            values = [means[name] for means in gathered if name in means]
            self.storage.put_scalar(name, np.mean(values), smoothing_hint=False)

    def gather_finite_means(self) -> list[dict[str, float]]:
        """Every process's means of the losses since the last log line.

        Raises:
            DivergedError: in all processes, where a mean of one of them is not finite.
        """
        try:
            own = self.metrics.compute()
        except DivergedError as error:
            own = error
        gathered = comm.all_gather(own)
        for means in gathered:
            if isinstance(means, DivergedError):
                raise means
        return gathered

    def assert_state_finite(self) -> None:
        """See that this process's weights and its optimiser's state may be saved.

        Raises:
            DivergedError: they are not finite.
        """
        tensors = {name.removeprefix("module."): value for name, value in self.model.state_dict().items()}
        for index, state in enumerate(self.optimizer.state.values()):
            tensors.update({f"{name} of the optimiser's parameter {index}": value for name, value in state.items()})
        assert_finite_tensors(tensors)

    def collect_state(self) -> None:
        """Bring to the main process what differs between them. All call it before that one saves."""
        self._metric_states = comm.gather(self._own_metrics())

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "metrics": self._metric_states or [self._own_metrics()],
        }

    def _own_metrics(self) -> list[dict[str, Any]]:
        return [self.metrics.state_dict(), self.model_scalars.state_dict()]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.scaler.load_state_dict(state_dict["scaler"])
        states = state_dict["metrics"]
        for metrics, own in zip((self.metrics, self.model_scalars), zip(*states, strict=True), strict=True):
            # Of another number of processes the average is taken: it is what is logged.
            metrics.load_state_dict(
                own[comm.get_rank()] if len(own) == comm.get_world_size() else average_states(list(own))
            )
