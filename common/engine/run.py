"""A run folder and the training that fills it: what both trainers do around their steps."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from detectron2.engine import hooks
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from d2distill.common.config import import_extensions
from d2distill.common.engine.checkpoint import RunCheckpointer, save_student, write_atomically
from d2distill.common.engine.distributed import check_processes, run_on_main_process
from d2distill.common.engine.hooks import CheckpointHook, EvaluationHook, WriterHook
from d2distill.common.engine.preemption import EvaluationInterrupted, InterruptibleLoader, Preemption
from d2distill.common.engine.settings import apply_new_hyperparams, config_diff, flat_settings, param_group_hparams
from d2distill.common.engine.trainer import StepTrainer
from d2distill.common.engine.writers import build_writers
from d2distill.common.errors import CheckpointError, ConfigError, DivergedError, UserError

__all__ = ["RunTrainer", "prepare_run", "start_logs"]

logger = logging.getLogger("detectron2.d2distill")


class RunTrainer(StepTrainer):
    """StepTrainer with evaluation, logs, checkpoints and the student's own files in ``cfg.OUTPUT_DIR``.

    A subclass states `fixed`, `test()`, `student_state()`, and where it has them `cost()` and `epoch_length`.

    Args:
        cfg: OUTPUT_DIR, SEED, LOG_PERIOD and SOLVER.CHECKPOINT_KEEP are read here.
        model: what is called; `network` itself, or wrapped for several processes.
        network: what is saved.
        optimizer, build_batches, precision, clip: see :class:`StepTrainer`.
        schedule: of the optimiser's learning rates, in steps.
        max_iter: steps of the whole run.
        test_period: in steps.
        select: the metric that decides which student is the best one.
        facts: of the run beside `fixed`; it is not resumed where they are others.
    """

    #: The settings under another value of which it would not be the same run.
    fixed: tuple[str, ...] = ()
    #: In steps; 0 where there are no epochs.
    epoch_length = 0

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        build_batches: Callable[[int], Iterable[Any]],
        schedule: LRMultiplier,
        *,
        max_iter: int,
        test_period: int,
        select: str,
        facts: Mapping[str, Any],
        precision: torch.dtype | None = None,
        clip: float = 0.0,
    ) -> None:
        super().__init__(model, optimizer, build_batches, cfg.SEED, precision, clip)
        self.cfg = cfg
        self.max_iter = max_iter
        self.settings = flat_settings(cfg)
        self.facts = {**{key: self.settings[key] for key in self.fixed}, **facts}
        self._schedule = schedule
        self._groups = param_group_hparams(optimizer)
        self.checkpointer = RunCheckpointer(network, cfg.OUTPUT_DIR, keep=cfg.SOLVER.CHECKPOINT_KEEP, trainer=self)
        # Of training and evaluation, over all restarts.
        self.seconds = 0.0
        self.preemption = Preemption()
        # What the log line of the present step has so far, where its evaluation was left.
        self._unfinished: dict[str, float] | None = None
        # The hooks with a state come before a checkpoint is loaded; the others when the first step is known.
        self.evaluation = EvaluationHook(self.test, test_period, select, lambda: self.save_student("best"))
        self.register_hooks([hooks.IterationTimer(), hooks.LRScheduler(optimizer, schedule), self.evaluation])

    def test(self) -> dict[str, float]:
        """Metrics of the student on the test split, larger is better; empty beside the main process."""
        raise NotImplementedError

    def last_test(self) -> dict[str, float]:
        """More metrics, taken once after the training; empty beside the main process."""
        return {}

    def watched(self, batches: Iterable[Any]) -> InterruptibleLoader:
        """Batches for :meth:`test` that end where the job is to stop, or one cannot be had."""
        return InterruptibleLoader(batches, self.preemption)

    def student_state(self) -> dict[str, Tensor]:
        """The student's state dict, as a stock network of its kind loads it."""
        raise NotImplementedError

    def cost(self) -> dict[str, float]:
        """Facts of the student for results.json."""
        return {}

    def save_student(self, name: str) -> None:
        """Write ``student_<name>.pth``."""
        save_student(Path(self.cfg.OUTPUT_DIR, f"student_{name}.pth"), self.student_state())

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one, and return the step to go on from.

        Settings beside `fixed` may be others than before, and then hold from that step on; the log says which.

        Raises:
            CheckpointError: no checkpoint can be read, or the run was made with settings under which this would be
                another run.
            ConfigError: more steps are done than this run is to have.
        """
        found = self.checkpointer.newest()
        if found is None:
            logger.warning(f"--resume: there is no checkpoint in {self.cfg.OUTPUT_DIR}; starting from the beginning")
            return 0
        path, saved = found
        # Before anything is loaded, which may fail for the same reason and says less of it.
        changed = [f"{k} was {saved[k]!r}, now {v!r}" for k, v in self.facts.items() if saved.get(k, v) != v]
        if changed:
            raise CheckpointError(
                f"{self.cfg.OUTPUT_DIR} cannot be resumed as another run: {'; '.join(changed)}. Set it as it was, or "
                "choose another OUTPUT_DIR"
            )
        self.checkpointer.restore(path, saved)
        done = self.iter + 1
        changed = config_diff(saved.get("settings", {}), self.settings)
        if done == self.max_iter:
            logger.info(f"All {self._amount(done)} are done already")
        elif changed:
            logger.warning(f"--resume: from step {done} on other settings hold than before: {'; '.join(changed)}")
        return done

    def _amount(self, steps: int) -> str:
        return f"{steps / self.epoch_length:g} epochs" if self.epoch_length else f"{steps} iterations"

    def run(self, start: int, checkpoint_periods: list[int]) -> dict[str, float]:
        """Train from step `start` to the end, saving at multiples of each of `checkpoint_periods` (in steps).

        Returns:
            The last value of each metric and the best under ``best_<metric>`` on the main process, else nothing.

        Raises:
            UserError: what ended the training, after a line in the log.
        """
        writers: list[EventWriter] = []
        # Only now, so that a call that fails leaves the folder of an earlier run as it was.
        run_on_main_process(lambda: writers.extend(self._begin(start)))
        self._writer = WriterHook(writers, self.cfg.LOG_PERIOD, self.epoch_length)
        extra = {**self.facts, "settings": self.settings}
        self._saver = CheckpointHook(self.checkpointer, checkpoint_periods, self.preemption, extra)
        self.register_hooks([self._writer, self._saver])
        self._begun = time.perf_counter() - self.seconds
        try:
            self.train(start, self.max_iter)
            results = {**(self.evaluation.summary() if comm.is_main_process() else {}), **self.last_test()}
            run_on_main_process(lambda: self._finish(results))
        except DivergedError as error:
            diverged = DivergedError(error.what, self._way_on())
            logger.error(diverged)
            raise diverged from error
        except UserError as error:
            logger.error(error)
            raise
        return results

    def _begin(self, start: int) -> list[EventWriter]:
        # Nothing is made with the settings of a call that finds its run finished.
        if start < self.max_iter:
            for name, text in (("config.yaml", self.cfg.dump()), ("environment.txt", collect_env_info() + "\n")):
                self._write(name, text)
            logger.info(f"Run folder {self.cfg.OUTPUT_DIR}: settings in config.yaml, versions in environment.txt")
        return build_writers(self.cfg.OUTPUT_DIR, start, self.max_iter)

    def _finish(self, results: dict[str, float]) -> None:
        self.save_student("final")
        facts = {**results, **self.cost(), "seconds": self.seconds}
        # JSON has no NaN, which a metric is that is not defined on the data.
        facts = {name: None if value != value else value for name, value in facts.items()}
        self._write("results.json", json.dumps(facts, indent=2))

    def _write(self, name: str, text: str) -> None:
        write_atomically(Path(self.cfg.OUTPUT_DIR, name), lambda file: file.write(text.encode()))

    def _way_on(self) -> str:
        files = self.checkpointer.files()
        if not files:
            return "there is no checkpoint yet: start again"
        earlier = " (delete it to go on from the one before)" if files[1:] else ""
        return f"`--resume` goes on from {files[0]}{earlier}"

    def before_train(self) -> None:
        super().before_train()
        if self._unfinished is not None:
            # The step before was made by the run that was stopped; its evaluation comes first.
            self.iter = self.storage.iter = self.start_iter - 1
            self.storage.put_scalars(**self._unfinished, smoothing_hint=False)
            self._unfinished = None
            self._or_stop(lambda: [hook.after_step() for hook in (self.evaluation, self._writer, self._saver)])
            self.iter = self.storage.iter = self.start_iter

    def after_step(self) -> None:
        self.seconds = time.perf_counter() - self._begun
        self._or_stop(super().after_step)

    def _or_stop(self, finish: Callable[[], Any]) -> None:
        """Do what follows a step; where its evaluation is left half done, save what was done before it, and end."""
        try:
            finish()
        except EvaluationInterrupted as stop:
            latest = self.storage.latest().items()
            self._unfinished = {name: value for name, (value, step) in latest if step == self.iter and name == "lr"}
            if stop.error is None:
                self._saver.save_and_stop()
            self._saver.save()
            logger.warning(f"Saved after step {self.iter + 1}; `--resume` begins with its evaluation")
            raise stop.error from None

    def state_dict(self) -> dict[str, Any]:
        own = {"seconds": self.seconds, "unfinished": self._unfinished, "groups": self._groups}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        done = state_dict["iteration"] + 1
        if done > self.max_iter:
            raise ConfigError(
                f"{self._amount(done)} are done in {self.cfg.OUTPUT_DIR}, more than the {self._amount(self.max_iter)} "
                "asked for: a run can be made longer, but not shorter than it is"
            )
        super().load_state_dict(state_dict)
        apply_new_hyperparams(self.optimizer, self._schedule, state_dict.get("groups", self._groups), self._groups)
        self.seconds = state_dict["seconds"]
        self._unfinished = state_dict["unfinished"]


def prepare_run(cfg: CfgNode, resume: bool) -> None:
    """What comes before data and networks: own modules, checks of the run folder and the batch size, logs.

    Args:
        cfg: a checked configuration.
        resume: the folder may hold a run.

    Raises:
        ConfigError: the folder holds another run or cannot be used, or a batch or device does not fit the number of
            processes.
    """
    # Processes that Detectron2 started have imported nothing yet.
    import_extensions(cfg.IMPORTS)
    check_processes(cfg)
    run_on_main_process(lambda: _make_folder(cfg.OUTPUT_DIR))
    if not resume and any(Path(cfg.OUTPUT_DIR).glob("model_*.pth")):
        raise ConfigError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds a run: continue it with --resume, or choose another folder"
        )
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def _make_folder(folder: str) -> None:
    """Before anything is read, which may take long: that it can be written to is seen by writing."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR {folder} cannot be used as a run folder: {error.strerror}; choose one that can be made and "
            "written to"
        ) from error


def start_logs(output_dir: str | None) -> None:
    """Send Detectron2's and our logs to the console and, in a run folder, to log.txt.

    One process may start several runs, one by one.
    """
    setup_logger.cache_clear()
    for name in ("fvcore", "detectron2"):
        logging.getLogger(name).handlers.clear()
        setup_logger(output_dir, distributed_rank=comm.get_rank(), name=name)
