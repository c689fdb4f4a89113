"""Hooks of both trainers, on Detectron2's. They are registered in the order evaluate, write, save:
a checkpoint then never knows more or less than the log that lies beside it."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicWriter

from d2distill.common.engine.checkpoint import RunCheckpointer
from d2distill.common.engine.distributed import run_on_main_process
from d2distill.common.engine.preemption import Preemption
from d2distill.common.errors import OutputError

__all__ = ["CheckpointHook", "EvaluationHook", "WriterHook"]

logger = logging.getLogger("detectron2.d2distill")
#: 128 + SIGTERM: what a shell reports for a process that ended on that signal.
PREEMPTED = 143


class EvaluationHook(HookBase):
    """Evaluates every `period` steps and after the last, and keeps the best value of each metric.

    Args:
        evaluate: returns {metric: value} on the main process, an empty dict elsewhere; larger is better.
        period: in steps.
        select: the metric that decides which model is the best one.
        on_best: called on the main process whenever that metric exceeds all before.
    """

    def __init__(
        self, evaluate: Callable[[], Mapping[str, float]], period: int, select: str, on_best: Callable[[], None]
    ) -> None:
        self._evaluate = evaluate
        self._period = period
        self._select = select
        self._on_best = on_best
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}

    def summary(self) -> dict[str, float]:
        """The last value of each metric, and the best under ``best_<metric>``."""
        return {**self.last, **{f"best_{name}": value for name, value in self.best.items()}}

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period and done != self.trainer.max_iter:
            return
        results = dict(self._evaluate())
        run_on_main_process(lambda: self._note(results, done))

    def _note(self, results: dict[str, float], done: int) -> None:
        if not results:
            return
        before, self.last = self.best.get(self._select), results
        # NaN, of a metric that is not defined on this data, loses against any number.
        self.best = {name: _larger(value, self.best.get(name, value)) for name, value in results.items()}
        self.trainer.storage.put_scalars(**self.summary(), smoothing_hint=False)
        facts = ", ".join(f"{name} {value:.2f} (best {self.best[name]:.2f})" for name, value in results.items())
        logger.info(f"Evaluation after {done} steps: {facts}")
        if results[self._select] == self.best[self._select] != before:
            self._on_best()

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last, self.best = state["last"], state["best"]


class WriterHook(PeriodicWriter):
    """Detectron2's PeriodicWriter that writes at each epoch's end as well, and a line only for what is complete.

    Args:
        writers: Detectron2 event writers; used on the main process.
        period: in steps.
        epoch_length: in steps; 0 where there are no epochs.
    """

    def __init__(self, writers: list, period: int, epoch_length: int = 0) -> None:
        super().__init__(writers, period)
        self._epoch_length = epoch_length

    def after_step(self) -> None:
        done, length = self.trainer.iter + 1, self._epoch_length
        if done % self._period and done != self.trainer.max_iter and not (length and done % length == 0):
            return
        self.trainer.log_metrics()
        if length:
            self.trainer.storage.put_scalar("epoch", done / length, smoothing_hint=False)
        run_on_main_process(self._write)

    def _write(self) -> None:
        try:
            for writer in self._writers:
                writer.write()
        except OSError as error:
            raise OutputError(f"the run's log cannot be written: {error.strerror or error}") from error

    def after_train(self) -> None:
        # Nothing is written here: what a run that was cut off has pending, the resumed one writes in its place.
        for writer in self._writers:
            writer.close()


class CheckpointHook(HookBase):
    """Saves at multiples of each of `periods` and after the last step; on SIGTERM finishes the step, saves, exits 143.

    Args:
        checkpointer: knows the trainer as a checkpointable.
        periods: in steps.
        preemption: what knows of SIGTERM; it is installed for the training.
        extra: facts of the run to keep in the file.
    """

    def __init__(
        self,
        checkpointer: RunCheckpointer,
        periods: list[int],
        preemption: Preemption,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self._checkpointer = checkpointer
        self._periods = periods
        self._preemption = preemption
        self._extra = extra or {}

    def before_train(self) -> None:
        self._preemption.install()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._preemption.requested_on_any_rank():
            self.save_and_stop()
        if any(done % period == 0 for period in self._periods) or done == self.trainer.max_iter:
            self.save()

    def save(self) -> None:
        """Save after the present step. All processes call it.

        Raises:
            DivergedError: in all of them, where losses, weights or the optimiser's state are not finite.
            OutputError: in all of them, where the file cannot be written.
        """
        self.trainer.gather_finite_means()
        self.trainer.collect_state()
        run_on_main_process(self._write)

    def save_and_stop(self) -> None:
        """Save after the present step and end the process. All processes call it."""
        self.save()
        logger.warning(f"SIGTERM: saved after step {self.trainer.iter + 1}; `--resume` continues")
        raise SystemExit(PREEMPTED)

    def _write(self) -> None:
        # A last update may break what losses show only in the next step, and statistics break before any loss does.
        self.trainer.assert_state_finite()
        self._checkpointer.save(f"model_{self.trainer.iter + 1:07d}", **self._extra)

    def after_train(self) -> None:
        self._preemption.remove()


def _larger(value: float, best: float) -> float:
    return best if best >= value or math.isnan(value) else value
