"""Hooks of the trainer, on Detectron2's. They run in the order save, evaluate, write: what comes after a checkpoint is
repeated when a run is resumed from it, so that the log then has neither more nor less than it would have."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase

from d2distill.common.engine.checkpoint import RunCheckpointer
from d2distill.common.engine.distributed import run_on_main_process
from d2distill.common.engine.folder_lock import check_folder
from d2distill.common.engine.preemption import Preemption, stop
from d2distill.common.engine.writers import build_writers
from d2distill.common.errors import writing

logger = logging.getLogger("detectron2.d2distill")


class CheckpointHook(HookBase):
    """Saves at multiples of each of `periods` and after the last step; on SIGTERM and Ctrl-C it saves and exits.

    `facts` of the run are kept in the file; `preemption` is installed for the training.
    """

    def __init__(
        self, checkpointer: RunCheckpointer, periods: list[int], preemption: Preemption, facts: dict[str, Any]
    ) -> None:
        self._checkpointer, self._periods, self._preemption, self._facts = checkpointer, periods, preemption, facts

    def before_train(self) -> None:
        self._preemption.install()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        preempted = self._preemption.requested_on_any_rank()
        if preempted or done == self.trainer.max_iter or any(done % period == 0 for period in self._periods):
            self.save()
        if preempted:
            stop(preempted, f"saved after step {done}; `--resume` continues")

    def save(self) -> None:
        """Save after the present step, if all is finite. All processes call it."""
        self.trainer.gather_finite_means()
        self.trainer.collect_state()
        run_on_main_process(self._write)

    def _write(self) -> None:
        # A last update may break what losses show only in the next step, and statistics break before any loss does.
        self.trainer.assert_state_finite()
        self._checkpointer.save(f"model_{self.trainer.iter + 1:07d}", **self._facts)

    def after_train(self) -> None:
        self._preemption.remove()


class EvaluationHook(HookBase):
    """Evaluates every `period` steps and after the last, and keeps the best value of each metric.

    Args:
        evaluate: returns {metric: value} on the main process, an empty dict on other ranks; larger is better, and of
            what is called a loss none is the best.
        period: in steps.
        best: for each student that is kept, its name and the metric that decides.
        on_best: called on the main process with such a name whenever its metric exceeds all before.
    """

    def __init__(
        self, evaluate: Callable[[], Mapping[str, float]], period: int, best: Mapping[str, str], on_best: Callable
    ) -> None:
        self._evaluate, self._period, self._deciding, self._on_best = evaluate, period, best, on_best
        self.last, self.best = {}, {}

    def summary(self) -> dict[str, float]:
        """The last value of each metric, and the best under ``best_<metric>``."""
        return {**self.last, **{f"best_{name}": value for name, value in self.best.items()}}

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            start = time.perf_counter()
            results = self._evaluate()
            seconds = time.perf_counter() - start
            run_on_main_process(lambda: self._record(results, done, seconds))

    def _record(self, results: Mapping[str, float], done: int, seconds: float) -> None:
        before, self.last = self.best, dict(results)
        rated = {name: value for name, value in results.items() if not name.endswith("loss")}
        # NaN, of a metric that is not defined on this data, loses against any number.
        self.best = {name: np.fmax(value, before.get(name, value)).item() for name, value in rated.items()}
        self.trainer.storage.put_scalars(**self.summary(), smoothing_hint=False)
        best = {name: f" (best {value:.2f})" for name, value in self.best.items()}
        facts = ", ".join(f"{name} {value:.2f}{best.get(name, '')}" for name, value in results.items())
        logger.info(f"Evaluation after {done} steps ({seconds:.1f} s): {facts}")
        for student, metric in self._deciding.items():
            if results[metric] == self.best[metric] != before.get(metric):
                self._on_best(student)

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last, self.best = state["last"], state["best"]


class WriterHook(HookBase):
    """Detectron2's PeriodicWriter with several `periods` in steps (0 is none), and a line at the end of each epoch.

    The period of the evaluations is among them: a line has what belongs to one step.

    Args:
        loggers, settings: as of :func:`build_writers`.
        images_per_step: over all processes, for ``images_per_second``; 0: not known.
    """

    def __init__(
        self,
        output_dir: str,
        periods: list[int],
        epoch_length: int = 0,
        loggers: Sequence[str] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
        images_per_step: float = 0.0,
    ) -> None:
        self._output_dir, self._epoch_length, self._images_per_step = output_dir, epoch_length, images_per_step
        self._loggers, self._settings, self._writers = loggers, settings, []
        self._periods = [period for period in (*periods, epoch_length) if period]

    def before_train(self) -> None:
        run_on_main_process(self._open)

    def _open(self) -> None:
        given = (self.trainer.start_iter, self.trainer.max_iter, self._loggers, self._settings, self._epoch_length)
        with writing(f"the run's log in {self._output_dir}"):
            self._writers = build_writers(self._output_dir, *given)

    def after_step(self) -> None:
        done, length = self.trainer.iter + 1, self._epoch_length
        if done != self.trainer.max_iter and all(done % period for period in self._periods):
            return
        self.trainer.log_metrics()
        if length:
            self.trainer.storage.put_scalar("epoch", done / length, smoothing_hint=False)
        self._put_speed(self.trainer.max_iter - done)
        run_on_main_process(self._write)

    def _put_speed(self, left: int) -> None:
        storage = self.trainer.storage
        if "time" in storage.histories():  # Detectron2 does not time the first steps
            steps = storage.history("time")
            storage.put_scalar("eta_seconds", steps.median(1000) * left, smoothing_hint=False)
            if self._images_per_step:
                speed = self._images_per_step / steps.avg(20)
                storage.put_scalar("images_per_second", speed, smoothing_hint=False)
        if torch.cuda.is_initialized():
            # The most so far, in MiB of this process's GPU.
            storage.put_scalar("max_mem", torch.cuda.max_memory_allocated() / 2**20, smoothing_hint=False)

    def _write(self) -> None:
        # Some of the writers do not see it by themselves.
        check_folder(self._output_dir)
        with writing(f"the run's log in {self._output_dir}"):
            for writer in self._writers:
                writer.write()
        # TensorBoard's writer takes the pictures; without it they would stay in memory.
        self.trainer.storage.clear_images()
        self.trainer.storage.clear_histograms()

    def after_train(self) -> None:
        # Nothing is written here: what a run that was cut off has pending, the resumed one writes in its place.
        for writer in self._writers:
            with suppress(OSError):  # what could not be written was reported, and is no more to be written
                writer.close()
