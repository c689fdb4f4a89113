"""The trainer of both tasks: one visible step, a function of (seed, step), and the hooks around it."""

import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.engine import TrainerBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode
from torch import Tensor

from d2distill import __version__
from d2distill.common.engine import report, run_folder
from d2distill.common.engine.accumulation import accumulate
from d2distill.common.engine.checkpoint import RunCheckpointer, assert_finite_tensors, save_student
from d2distill.common.engine.cli import user_message
from d2distill.common.engine.cuda_graphs import CudaGraph
from d2distill.common.engine.distributed import run_on_main_process
from d2distill.common.engine.ema import EMAHook
from d2distill.common.engine.hooks import CheckpointHook, EvaluationHook, WriterHook
from d2distill.common.engine.metrics import FirstFailure, MeanMetrics
from d2distill.common.engine.peers import check_same_on_all_ranks, naming_ended_rank, worth_a_traceback
from d2distill.common.engine.preemption import InterruptibleLoader, Preemption, stop
from d2distill.common.engine.progress import ProgressLine
from d2distill.common.engine.seeding import seed_step
from d2distill.common.engine.settings import apply_new_hyperparams, config_diff, flat_settings, param_group_hparams
from d2distill.common.engine.task import Task
from d2distill.common.errors import CheckpointError, ConfigError, DivergedError

logger = logging.getLogger("detectron2.d2distill")


class Trainer(TrainerBase):
    """Trains a task: Detectron2's loop and hooks around :meth:`train_step`, which is exact under restarts.

    Args:
        cfg: OUTPUT_DIR, SEED, LOG_PERIOD, LOGGERS, REPORT, SOLVER.CHECKPOINT_KEEP, EMA_DECAY and ACCUMULATE are read
            here.
        task: what is trained.
    """

    def __init__(self, cfg: CfgNode, task: Task) -> None:
        super().__init__()
        logging.getLogger(TrainerBase.__module__).addFilter(worth_a_traceback)
        self.cfg, self.task = cfg, task
        self.model, self.optimizer = task.wrapped, task.optimizer
        self.max_iter, self.epoch_length = task.max_iter, task.epoch_length
        self.device = next(task.model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=task.precision is torch.float16)
        parts = cfg.SOLVER.ACCUMULATE
        self.split_batch = accumulate(task.split_batch, parts) if parts > 1 else task.split_batch
        self.forward_backward = self._forward_backward
        if task.graph_inputs is not None:
            given = (self._forward_backward, self.device, task.model.parameters(), self._graph_inputs)
            self.forward_backward = CudaGraph("The step", *given)
        self.metrics, self.first_failure = MeanMetrics(), FirstFailure()
        # Of what the model itself puts into the event storage.
        self.model_scalars = MeanMetrics()
        self._metric_states: list[list[dict[str, Any]]] = []
        self._batches: Iterator[Any] = iter(())
        # Over all restarts.
        self.seconds, self._started_at = 0.0, time.perf_counter()
        self.settings = flat_settings(cfg)
        self._hparams = param_group_hparams(task.optimizer)
        self.preemption = Preemption()
        self.checkpointer = RunCheckpointer(
            task.model, cfg.OUTPUT_DIR, keep=cfg.SOLVER.CHECKPOINT_KEEP, trainer=self, **task.checkpointables
        )
        self.ema = EMAHook(task.deployed_student, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None
        best = {"best": task.best_metric} | ({"ema_best": f"ema_{task.best_metric}"} if self.ema else {})
        self.evaluation = EvaluationHook(self.evaluate, task.eval_period, best, self.save_student)
        facts = {"run_identity": dict(task.run_identity), "settings": self.settings}
        saves = [*task.checkpoint_periods, task.eval_period]
        # A checkpoint is what the update left. The hooks behind it are repeated when a run is resumed from it.
        self.checkpointing = CheckpointHook(self.checkpointer, saves, self.preemption, facts)
        logged = ([cfg.LOG_PERIOD, task.eval_period], task.epoch_length, cfg.LOGGERS, self.settings)
        self.hooks_after_checkpoint = [
            hooks.LRScheduler(task.optimizer, task.lr_scheduler),
            self.ema,
            self.evaluation,
            WriterHook(cfg.OUTPUT_DIR, *logged, task.images_per_step),
        ]
        self.register_hooks([hooks.IterationTimer(), self.checkpointing, *self.hooks_after_checkpoint])
        if comm.is_main_process() and sys.stderr.isatty():
            self.register_hooks([ProgressLine(task.epoch_length)])

    def train_step(self) -> None:
        """Forward, backward, update: the only place where a step happens."""
        batch = self._next_batch()
        seed_step(self.cfg.SEED, self.iter)
        if self.task.prepare is not None:
            batch = self.task.prepare(batch)
        self.optimizer.zero_grad()
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for part, weight in self.split_batch(batch, self.iter):
            part_losses, finite, part_metrics = self.forward_backward(part, weight)
            self.first_failure.update(finite, part_losses)
            losses = {n: losses[n] + v if n in losses else v for n, v in part_losses.items()}
            metrics |= {n: metrics.get(n, 0) + weight * value for n, value in part_metrics.items()}
        self.after_backward()
        if self.task.clip_norm:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.task.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.metrics.update({"total_loss": sum(losses.values()), **losses, **metrics})

    run_step = train_step

    def _forward_backward(self, part: Any, weight: float) -> tuple[dict[str, Tensor], ...]:
        """Losses, whether each network's outputs were finite, and metrics of a part of a batch; its gradients are then
        where the optimizer finds them."""
        with self._forward_context():
            losses = self.model(part)
        if weight != 1:
            losses = {name: weight * value for name, value in losses.items()}
        if self.task.backward is not None:
            self.task.backward(losses)
        else:
            self.scaler.scale(sum(losses.values())).backward()
        return {n: v.detach() for n, v in losses.items()}, self.task.finite_outputs(), self.task.step_metrics()

    def _graph_inputs(self, part: Any, weight: float) -> tuple[Any, float]:
        with self._forward_context():
            return self.task.graph_inputs(part), weight

    def _next_batch(self) -> Any:
        start = time.perf_counter()
        batch = next(self._batches)
        self.storage.put_scalar("data_time", time.perf_counter() - start)
        return batch

    @contextmanager
    def _forward_context(self) -> Iterator[None]:
        """Autocast, and what the model puts into the event storage collected for the next log line."""
        precision = self.task.precision
        autocast = torch.autocast(self.device.type, precision, enabled=precision is not None)
        # TorchScript's profiling executor changes numerics on a function's second call; off on CPU, so that resumed
        # runs are bit-identical.
        scripted = torch.jit.optimized_execution(self.device.type != "cpu")
        # In a storage of its own: the trainer's smooths over a window, which a restart would cut.
        with EventStorage(self.iter) as scalars, autocast, scripted:
            try:
                yield
            except FloatingPointError as error:  # Detectron2's networks look at what they compute
                raise DivergedError(str(error)) from error
        self.model_scalars.update({name: value for name, (value, _) in scalars.latest().items()})
        self.storage._vis_data += scalars._vis_data
        self.storage._histograms += scalars._histograms

    def run(self, resume: bool = False) -> dict[str, float]:
        """Train to the end, from the latest checkpoint of the run folder with `resume`.

        Returns:
            The last value of each metric and the best under ``best_<metric>`` on the main process, else nothing.

        Raises:
            UserError, OSError: what ended the training, after a line in the log.
            SystemExit: preempted; everything is saved.
        """
        check_same_on_all_ranks({"--resume": resume, **self.task.run_identity})
        start = self.resume() if resume else 0
        results = run_folder.read_results(self.cfg.OUTPUT_DIR, self.max_iter) if start == self.max_iter else None
        if results is not None:
            logger.info(f"All {self._format_progress(start)} are done already: see {run_folder.RESULTS}")
            if not Path(self.cfg.OUTPUT_DIR, report.REPORT).exists():
                run_on_main_process(lambda: report.write_run_report(self.cfg, self.task))
            return results if comm.is_main_process() else {}
        # Only now, so that a call that fails leaves the folder of an earlier run as it was.
        if start < self.max_iter:
            run_on_main_process(lambda: run_folder.write_run_folder(self.cfg))
        self._started_at = time.perf_counter() - self.seconds
        try:
            with naming_ended_rank():
                self.train(start, self.max_iter)
            if signal := self.preemption.requested_on_any_rank():
                stop(signal, "all steps are saved; `--resume` finishes the run")
            results = self.evaluation.summary() if comm.is_main_process() else {}
            results = {**results, **self.task.evaluate_once(self.task.deployed_student())}
            run_on_main_process(lambda: self._finish(results))
        except Exception as error:
            if isinstance(error, DivergedError):
                error.hint = self._recovery_hint()
            if message := user_message(error):
                logger.error(message)
            raise
        return results

    def _finish(self, results: dict[str, float]) -> None:
        self.save_student("final")
        if self.ema is not None:
            self.save_student("ema_final")
        stats = self.task.model_stats(self.task.deployed_student())
        facts = {**self.task.facts(), **stats, "seconds": self.seconds, "steps": self.max_iter}
        # JSON has no NaN, which a metric is that is not defined on the data.
        results = {name: None if value != value else value for name, value in results.items()}
        run_folder.write_text(Path(self.cfg.OUTPUT_DIR, run_folder.RESULTS), json.dumps({**results, **facts}, indent=2))
        report.write_run_report(self.cfg, self.task)

    def evaluate(self) -> dict[str, float]:
        """Metrics of the deployed student, and under ``ema_<metric>`` of its average; empty on other ranks."""
        interruptible = partial(InterruptibleLoader, preemption=self.preemption)
        results = self.task.evaluate(self.task.deployed_student(), interruptible)
        if self.ema is not None:
            averaged = self.task.evaluate(self.ema.network, interruptible)
            results = {**results, **{f"ema_{name}": value for name, value in averaged.items()}}
        return results

    def save_student(self, name: str) -> None:
        """Write ``student_<name>.pth``; a name that begins with ``ema_`` is of the average."""
        network = self.ema.network if name.startswith("ema_") else self.task.deployed_student()
        description = {"d2distill": __version__, **self.task.description()}
        folder = Path(self.cfg.OUTPUT_DIR)
        run_folder.write_text(folder / "student.json", json.dumps(description, indent=2, ensure_ascii=False))
        save_student(folder / f"student_{name}.pth", network.state_dict(), description)

    def resume(self) -> int:
        """Load the latest valid checkpoint, if there is one, and return the step to continue from.

        Settings of ``task.may_change`` may be others than before, and apply from that step on; the log says which.
        """
        found = self.checkpointer.latest()
        if found is None:
            logger.warning(f"--resume: there is no checkpoint in {self.cfg.OUTPUT_DIR}; starting from the beginning")
            return 0
        path, saved = found
        # Before anything is loaded, which may fail for the same reason and says less of it.
        before, now = {**saved["settings"], **saved["run_identity"]}, {**self.settings, **self.task.run_identity}
        if refused := config_diff(before, now, self.task.may_change):
            raise CheckpointError(
                f"{self.cfg.OUTPUT_DIR} cannot be resumed as another run: {'; '.join(refused)}. Set it as it was, or "
                "choose another OUTPUT_DIR"
            )
        self.checkpointer.restore(path, saved)
        done, changed = self.iter + 1, config_diff(saved["settings"], self.settings)
        if changed:
            late = "all steps are done, so that these have no effect"
            what = late if done == self.max_iter else f"from step {done} on other settings apply than before"
            logger.warning(f"--resume: {what}: {'; '.join(changed)}")
        return done

    def _format_progress(self, steps: int) -> str:
        return f"{steps / self.epoch_length:g} epochs" if self.epoch_length else f"{steps} iterations"

    def _recovery_hint(self) -> str:
        files = self.checkpointer.files()
        if not files:
            return "there is no checkpoint yet: start again"
        earlier = " (delete it to continue from the one before)" if files[1:] else ""
        return f"`--resume` continues from {files[0]}{earlier}"

    def before_train(self) -> None:
        super().before_train()
        self.model.train()
        if self.start_iter:
            # What the run that was stopped may not have done any more after it saved.
            self.iter = self.storage.iter = self.start_iter - 1
            with warnings.catch_warnings():
                # The optimizer's step was made by that run.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                for hook in filter(None, self.hooks_after_checkpoint):
                    hook.after_step()
            self.iter = self.storage.iter = self.start_iter
        self._batches = iter(self.task.build_batches(self.start_iter))

    def after_step(self) -> None:
        self.seconds = time.perf_counter() - self._started_at
        super().after_step()

    def after_train(self) -> None:
        # Ends the loader's workers now, and not when the garbage collector finds the iterator.
        self._batches = iter(())
        super().after_train()

    def log_metrics(self) -> None:
        """Put the means since the last call, over all processes, into the event storage."""
        scalars = comm.all_gather(self.model_scalars.compute())
        gathered = [{**losses, **own} for losses, own in zip(self.gather_finite_means(), scalars, strict=True)]
        self.metrics.reset()
        self.model_scalars.reset()
        for name in {name: None for means in gathered for name in means}:
            # They are means already: smoothing them once more would depend on when the run was restarted.
            self.storage.put_scalar(name, np.mean([m[name] for m in gathered if name in m]), smoothing_hint=False)

    def gather_finite_means(self) -> list[dict[str, float]]:
        """Every process's means of the losses since the last log line.

        Raises:
            DivergedError, CheckpointError: in all processes, where a mean of one of them is not finite.
        """
        gathered = comm.all_gather(self.metrics.compute())
        for means in gathered:
            if not all(map(math.isfinite, means.values())):
                (source, *_) = [*filter(None, comm.all_gather(self.first_failure.source())), "a loss"]
                what = f"{source} became infinite or NaN since the last log line: {means}"
                if source == "the teacher's outputs":  # which no setting of the solver changes
                    raise CheckpointError(f"{what}; check the teacher's weights, its pixel statistics, and SOLVER.AMP")
                raise DivergedError(f"{what}.")
        return gathered

    def assert_state_finite(self) -> None:
        """Raise a DivergedError where this process's weights or its optimizer's state are not finite."""
        tensors = dict(self.task.model.state_dict())
        for index, state in enumerate(self.optimizer.state.values()):
            tensors.update({f"{name} of the optimizer's parameter {index}": value for name, value in state.items()})
        assert_finite_tensors(tensors)

    def collect_state(self) -> None:
        """Bring to the main process what differs between them. All call it before that one saves."""
        self._metric_states = comm.gather([self.metrics.state_dict(), self.model_scalars.state_dict()])

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "metrics": self._metric_states,
            "seconds": self.seconds,
            "hparams": self._hparams,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        done = state_dict["iteration"] + 1
        if done > self.max_iter:
            raise ConfigError(
                f"{self._format_progress(done)} are done in {self.cfg.OUTPUT_DIR}, more than the "
                f"{self._format_progress(self.max_iter)} asked for: a run can be made longer, not shorter than it is"
            )
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        apply_new_hyperparams(self.optimizer, self.task.lr_scheduler, state_dict["hparams"], self._hparams)
        self.scaler.load_state_dict(state_dict["scaler"])
        self.seconds = state_dict["seconds"]
        states = state_dict["metrics"]  # one per process; their number may be another now
        losses, scalars = states[comm.get_rank() % len(states)]
        self.metrics.load_state_dict(losses)
        self.model_scalars.load_state_dict(scalars)
