"""Processes for tests, forked from one that has everything imported: a new interpreter takes seconds for that.

Not from the test's own process: its threads may hold locks, and on a machine with a GPU its children cannot train.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from d2distill.common.engine.launch import join_job

ROOT = Path(__file__).resolve().parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_MODULES = ["tests.classification.tiny_training", "tests.detection.tiny_training", __name__]


def start(function: Callable, *arguments, output: Path | None = None, **environment) -> ForkServerProcess:
    """A process that calls `function`, found by its name, with this one's environment and `environment`.

    What it prints goes to the file `output`, if one is named.
    """
    environ = {**os.environ, **environment}
    # DataLoaders fork their workers there as they do here.
    method = multiprocessing.get_start_method()
    process = _CONTEXT.Process(target=_work, args=(environ, method, output, function, arguments))
    # Each time: the launcher of sweeps has a server of the same kind, with other modules.
    _CONTEXT.set_forkserver_preload(_MODULES)
    with pytest.MonkeyPatch.context() as patch:
        # The first call starts the server, which imports from there.
        patch.setenv("PYTHONPATH", str(ROOT))
        process.start()
    return process


def exit_code(process: ForkServerProcess) -> int:
    """Its exit code, minus the signal's number where one ended it, once it has ended."""
    process.join(300)
    if process.exitcode is None:
        process.kill()
        pytest.fail("the process does not end")
    return process.exitcode


def run_ranks(
    number: int,
    function: Callable,
    *arguments,
    store: TCPStore | None = None,
    hosted: bool = True,
    output: Path | None = None,
) -> list[int]:
    """Exit codes of `number` processes that call `function` as those of a job of torchrun's.

    Its `store` may be kept over several calls, as torchrun does over attempts; if not `hosted`, rank 0 has one, as by
    srun. What rank 1 prints goes to ``output/rank1``.
    """
    store = store or TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {"WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    job |= {"TORCHELASTIC_USE_AGENT_STORE": hosted, "TORCHELASTIC_RESTART_COUNT": 0}
    job = {name: str(value) for name, value in job.items()}
    if not hosted:
        del store  # leaves the port
    processes = []
    for rank in range(number):
        console = output and output / f"rank{rank}"
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(start(function, *arguments, output=console, **job, **own))
    return [exit_code(process) for process in processes]


def in_job(function: Callable, *arguments) -> None:
    """Call `function` as a process of the job that the environment describes."""
    with join_job():
        function(*arguments)


def script(path: str, *arguments) -> None:
    """What ``python PATH ARGUMENTS`` does."""
    sys.argv = [path, *map(str, arguments)]
    runpy.run_path(path, run_name="__main__")


def _work(environ: dict, method: str, output: Path | None, function: Callable, arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(ROOT)
    multiprocessing.set_start_method(method, force=True)
    torch.set_num_threads(1)
    if output is not None:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    function(*arguments)
