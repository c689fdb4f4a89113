"""Variants of a training step, each in a process of its own, run in turns and timed."""

import logging
import multiprocessing
import os
import platform
import resource
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import torch
from detectron2.utils.events import EventStorage

from d2distill import __version__
from d2distill.common.engine.cli import user_message
from d2distill.common.engine.trainer import Trainer
from d2distill.common.errors import ConfigError

#: Steps before the first timed round, and one more. On a GPU algorithms are chosen and graphs captured in the first.
WARMUP = {"cpu": 1, "cuda": 12}
#: A round is so many steps of every variant that the slowest takes about so long (at least 2, at most 500).
ROUND_SECONDS = 3.0


@dataclass
class Variant:
    """What is timed.

    Attributes:
        kind: a function of the task's module, by its name there.
        opts: ``KEY VALUE`` settings of it alone.
        again: time its second pass over the same batches (what a full cache serves).
    """

    kind: str
    opts: list[str] = field(default_factory=list)
    again: bool = False


@dataclass
class Runner:
    """A variant that is built, in its process.

    Attributes:
        step: the work that is timed.
        images: per step.
        device: "cpu" or "cuda".
        lead: steps before each timed round, which use up what loaders have made while the others ran.
        restart: begins again with the first batch.
        close: ends it.
        notes: what the result says of it.
    """

    step: Callable[[], None]
    images: int
    device: str
    lead: int = 0
    restart: Callable[[], None] | None = None
    close: Callable[[], None] = lambda: None
    notes: list[str] = field(default_factory=list)


class TrainerSteps:
    """The trainer's steps one by one, with its hooks and its loader."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._steps = self._run()

    def restart(self) -> None:
        self.close()
        self._steps = self._run()

    def close(self) -> None:
        self._steps.close()

    def _run(self) -> Iterator[None]:
        trainer = self.trainer
        trainer.start_iter = trainer.iter = 0
        with EventStorage(0) as trainer.storage:
            trainer.before_train()
            try:
                for trainer.iter in count():
                    trainer.before_step()
                    trainer.train_step()
                    trainer.after_step()
                    yield
            finally:
                trainer.after_train()

    def step(self) -> None:
        next(self._steps)

    def runner(self, images: int, lead: int, notes: list[str]) -> Runner:
        device = self.trainer.device.type
        return Runner(self.step, images, device, lead, self.restart, self.close, notes)


class VariantProcess:
    """A process that builds a variant and runs steps of it when it is told to.

    Of its own, so that no variant changes the memory, the flags or the caches of another. Call :meth:`wait` first.
    """

    def __init__(self, module: str, variant: Variant, arguments: dict[str, Any], threads: int) -> None:
        # Not forked from this process, which may have used the GPU. To spawn one imports everything each time, but on
        # an H100 the plain loop's loader did not get through its first batches in a child of the forkserver.
        context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload([module])
        self._connection, other = context.Pipe()
        self.folder = tempfile.mkdtemp(prefix="d2distill-benchmark-")
        opts = [item.replace("{tmp}", self.folder) for item in variant.opts]
        # Its loaders start their workers as those of a training do.
        arguments = {**arguments, "opts": [*arguments["opts"], *opts], "folder": self.folder}
        given = (multiprocessing.get_start_method(), other, module, variant.kind, arguments)
        # Not a daemon: it has the workers of data loaders.
        self._process = context.Process(target=_serve, args=(*given, threads), daemon=False)
        self._process.start()
        other.close()
        self.failed, self.facts = "", {}

    def wait(self) -> None:
        """Until it is built; then its `facts` are known: ``images`` per step and ``device``."""
        self.facts = self._receive()

    def run(self, steps: int, lead: bool = True) -> float | None:
        """Seconds per step; None after a failure, which is in `failed`."""
        return self._ask("run", steps, lead)

    def restart(self) -> None:
        self._ask("restart")

    def end(self) -> dict[str, Any]:
        """End the process; its peak memory and the log lines of the run."""
        facts = self._ask("end")
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        return facts

    def _ask(self, *command: Any) -> Any:
        if self.failed:
            return None
        self._connection.send(command)
        return self._receive()

    def _receive(self) -> Any:
        try:
            failed, value = self._connection.recv()
        except EOFError:
            failed, value = "its process ended: out of memory?", None
        self.failed = self.failed or failed
        return value


def _serve(
    start_method: str, connection: Connection, module: str, kind: str, arguments: dict[str, Any], threads: int
) -> None:
    multiprocessing.set_start_method(start_method, force=True)
    lines: list[str] = []
    log = logging.getLogger("detectron2.d2distill")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    if threads:
        torch.set_num_threads(threads)
    try:
        runner: Runner = getattr(import_module(module), kind)(**arguments)
        connection.send(("", {"images": runner.images, "device": runner.device}))
        while True:
            command, *values = connection.recv()
            if command == "end":
                runner.close()
                connection.send(("", {**_peak_memory(runner.device), "log": [*runner.notes, *dict.fromkeys(lines)]}))
                return
            connection.send(("", runner.restart() if command == "restart" else _timed(runner, *values)))
    except Exception as error:
        message = user_message(error) or f"{type(error).__name__}: {error}"
        connection.send((message.strip().splitlines()[0], None))


def _timed(runner: Runner, steps: int, lead: bool) -> float:
    for _ in range(runner.lead if lead else 0):
        runner.step()
    synchronize(runner.device)
    start = time.perf_counter()
    for _ in range(steps):
        runner.step()
    synchronize(runner.device)
    return (time.perf_counter() - start) / steps


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_memory(device: str) -> dict[str, float]:
    if device == "cuda":
        return {"peak_mb": torch.cuda.max_memory_allocated() / 1e6}
    # Of this process: the interpreter and the images in memory are part of it, loaders' workers are not.
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}


def measure(
    module: str,
    variants: dict[str, Variant],
    arguments: dict[str, Any],
    rounds: int,
    steps: int = 0,
    threads: int = 0,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Time the variants by turns: `rounds` rounds of `steps` steps of each, every other one in reverse order.

    Args:
        module: has a function for every kind, which is called with `arguments` and returns a :class:`Runner`.
        arguments: ``opts``, the settings of all variants, and what else the module's functions take.
        steps: 0: as many as take the slowest variant :data:`ROUND_SECONDS`.

    Returns:
        ``steps``, ``rounds``, ``variants`` by name, and ``ratios``, see :func:`ratios`.
    """
    processes: dict[str, VariantProcess] = {}
    try:
        for name, variant in variants.items():
            processes[name] = VariantProcess(module, variant, arguments, threads)
        for process in processes.values():
            process.wait()
        once = []
        for name, process in processes.items():
            say(f"  {name}{f': {process.failed}' if process.failed else ''}")
            if not process.failed:
                process.run(WARMUP[process.facts["device"]], lead=False)
                once.append(process.run(1))
        slowest = max(filter(None, once), default=1.0)
        steps = steps or min(max(round(ROUND_SECONDS / slowest), 2), 500)
        for name, variant in variants.items():
            if variant.again:
                # A lead before each round, and one more.
                for _ in range(rounds + 1):
                    processes[name].run(steps)
                processes[name].restart()
                processes[name].run(1)
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(rounds):
            for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
                seconds[name].append(processes[name].run(steps))
    finally:
        ended = {name: process.end() for name, process in processes.items()}
    results = {}
    for name, variant in variants.items():
        result: dict[str, Any] = {"kind": variant.kind, "settings": variant.opts}
        if processes[name].failed:
            results[name] = {**result, "failed": processes[name].failed}
            continue
        median = statistics.median(seconds[name])
        speed = {"seconds_per_step": median, "images_per_second": processes[name].facts["images"] / median}
        results[name] = {**result, **speed, **ended[name], "rounds": seconds[name]}
    return {"steps": steps, "rounds": rounds, "variants": results, "ratios": ratios(results)}


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times faster each variant of ours is than every other kind: medians of the rounds' ratios."""
    timed = {name: result["rounds"] for name, result in results.items() if "rounds" in result}
    found = {}
    for name, own in timed.items():
        for other, theirs in timed.items():
            if results[name]["kind"].startswith("ours") and not results[other]["kind"].startswith("ours"):
                found[f"{name}/{other}"] = statistics.median(b / a for a, b in zip(own, theirs, strict=True))
    return found


def machine(threads: int = 0) -> dict[str, Any]:
    """What the numbers depend on, and do not show. `threads`: torch's, 0: its own choice."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.partition(": ")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads or torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision")},
        "cuda": torch.version.cuda,
        "d2distill": __version__,
        "command": " ".join(["d2distill-benchmark", *sys.argv[1:]]),
    }


def parse_variants(texts: Iterable[str], again: bool) -> dict[str, Variant]:
    """Variants of ours from ``"NAME: KEY VALUE ..."``."""
    found = {}
    for text in texts:
        name, _, settings = text.partition(":")
        if not settings.strip():
            raise ConfigError(f'{text!r}: a variant is "NAME: KEY VALUE ..."')
        found[name.strip()] = Variant("ours", shlex.split(settings), again)
    return found
