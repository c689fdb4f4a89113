"""Where the runs of a comparison are made: in processes of this machine, or in jobs of SLURM."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

from d2distill.common.errors import ConfigError, MissingDependencyError

__all__ = ["Launcher", "LocalLauncher", "SlurmLauncher", "stop_signals", "visible_gpus"]

#: The last digits of a run depend on the number of threads: it is not left to the machine.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
#: What ends a command: Ctrl-C, a scheduler, a terminal that is closed.
_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Run(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def log_end(self) -> list[str]:
        """The last lines that it printed."""

    def stop(self) -> None:
        """Ask it to save and end; returns at once."""

    def wait(self) -> None:
        """Return when it has ended, after a minute by force."""


class Launcher(Protocol):
    #: How many runs at a time, where nobody says it.
    jobs: int

    def start(self, command: Sequence[str], folder: Path) -> Run:
        """Start a command whose run folder exists."""

    def close(self) -> None:
        """Called when all runs have ended."""


def visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named, count = os.environ.get("CUDA_VISIBLE_DEVICES", ""), torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


class LocalLauncher:
    """Processes of this machine. Where it has GPUs, a run sees one of them: that with the fewest runs.

    Args:
        gpus: as CUDA_VISIBLE_DEVICES names them; default: :func:`visible_gpus`.
        preload: modules that all runs import, which takes seconds. Without GPUs they are imported once, and the runs
            forked from there. With GPUs, to whose libraries a fork may do harm, and without such modules each run is an
            interpreter of its own.
    """

    def __init__(self, gpus: Sequence[str] | None = None, preload: Sequence[str] = ()) -> None:
        self.gpus = visible_gpus() if gpus is None else gpus
        self.jobs = len(self.gpus) or 2
        self.preload = [*preload]
        self.running: list[_Process] = []

    def start(self, command: Sequence[str], folder: Path) -> "_Process":
        self.running = [run for run in self.running if run.poll() is None]
        environment, console = {**os.environ, **_ENVIRONMENT}, folder / "console.txt"
        if self.preload and not self.gpus:
            self.running.append(_ForkedProcess(self._fork(command, console, environment), console))
        else:
            used = [run.gpu for run in self.running]
            gpu = min(self.gpus, key=used.count, default="")
            if gpu:
                environment["CUDA_VISIBLE_DEVICES"] = gpu
            with open(console, "w") as file:
                # In a session of its own, or Ctrl-C would kill it before it can save.
                process = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
            self.running.append(_Process(process, console, gpu))
        return self.running[-1]

    def close(self) -> None:
        # Waits for the server: the CPU time of its runs is then that of this process's children. A next run starts it
        # again. There is no public way.
        forkserver._forkserver._stop()

    def _fork(self, command: Sequence[str], console: Path, environment: dict[str, str]) -> ForkServerProcess:
        context, before = multiprocessing.get_context("forkserver"), dict(os.environ)
        context.set_forkserver_preload(self.preload)
        # DataLoaders fork their workers there as they do here.
        arguments = (command[1:], console, environment, multiprocessing.get_start_method())
        process = context.Process(target=_run_script, args=arguments)
        # The first one starts the server, in which the number of threads is read when torch is imported.
        os.environ.update(_ENVIRONMENT)
        # A signal to this process's group shall not end it, or the runs would be without the one who waits for them.
        resource_tracker.ensure_running()  # whose start resets the mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.environ.clear()
            os.environ.update(before)
        return process


def _run_script(argv: list[str], console: Path, environment: dict[str, str], start_method: str) -> None:
    """What ``python SCRIPT ARGUMENTS`` does, in a session of its own, printing into `console`."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)
    with open(console, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(start_method, force=True)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


@dataclass
class _Process:
    process: Any
    console: Path
    gpu: str = ""

    def poll(self) -> int | None:
        return self.process.poll()

    def log_end(self) -> list[str]:
        return self.console.read_text().splitlines()[-8:]

    def stop(self) -> None:
        self.process.terminate()

    def wait(self) -> None:
        self._join(60)
        if self.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its workers as well; its last periodic checkpoint stays
            self._join(None)

    def _join(self, seconds: float | None) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)


class _ForkedProcess(_Process):
    def poll(self) -> int | None:
        return self.process.exitcode

    def _join(self, seconds: float | None) -> None:
        self.process.join(seconds)


class SlurmLauncher:
    """Jobs of SLURM, through submitit. A job that is preempted, or reaches its time limit, is queued again and resumes.

    Args:
        folder: of the jobs' scripts and logs; one that all nodes see.
        settings: sbatch's options by their names, with _ for -, e.g. partition, gpus_per_node, time. ``cluster`` set
            to local makes the jobs processes of this machine, to try a line out.

    Raises:
        MissingDependencyError: submitit is not installed.
        ConfigError: this is no machine of a SLURM cluster, or a setting is unknown.
    """

    #: The cluster has its own queue.
    jobs = 1000
    #: submitit's names for what all its clusters have; other settings are SLURM's own.
    _SHARED = ("nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min", "name")

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ImportError:
            raise MissingDependencyError("--slurm needs submitit: pip install 'd2distill[slurm]'") from None
        settings = {"cluster": "slurm", "name": "d2distill", **settings}
        cluster = settings.pop("cluster")
        named = {key if key in self._SHARED else f"slurm_{key}": value for key, value in settings.items()}
        try:
            self.executor = submitit.AutoExecutor(folder, cluster=cluster)
            self.executor.update_parameters(**named)
        except (RuntimeError, NameError, ValueError, AssertionError) as error:
            raise ConfigError(f"--slurm {' '.join(f'{k}={v}' for k, v in settings.items())}: {error}") from error

    def start(self, command: Sequence[str], folder: Path) -> "_Job":
        return _Job(self.executor.submit(_Command(list(command))))

    def close(self) -> None:
        """The cluster needs no telling."""


@dataclass
class _Command:
    """What a job does: one run. It prints into the job's log."""

    command: list[str]
    process: subprocess.Popen | None = field(default=None, init=False)

    def __call__(self) -> int:
        self.process = subprocess.Popen(self.command, env={**os.environ, **_ENVIRONMENT})
        try:
            # Not wait(), whose lock checkpoint(), called in a signal handler, could not get.
            while self.process.poll() is None:
                time.sleep(0.2)
        finally:
            self.process.terminate()  # of a job that is cancelled
        return self.process.returncode

    def checkpoint(self) -> Any:
        """Called by submitit before a job is preempted or its time is over: the run saves, and another job resumes."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self.process.terminate()
            deadline = time.monotonic() + 60
            while self.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
        return DelayedSubmission(_Command(self.command))


@dataclass
class _Job:
    job: Any  # submitit's

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        # An exception is of a job that was killed or ran out of time.
        return 1 if self.job.exception() else self.job.result()

    def log_end(self) -> list[str]:
        lines = f"{self.job.stdout() or ''}\n{self.job.stderr() or ''}".splitlines()
        # submitit adds its own report.
        return [line for line in lines if line.strip() and not line.startswith("submitit ")][-8:]

    def stop(self) -> None:
        self.job.cancel(check=False)

    def wait(self) -> None:
        """Cancelled jobs end by themselves: SLURM sends SIGTERM first, at which they save."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The signals to stop that came within the block; those that the process ignores (nohup) stay ignored."""
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _STOP}
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
