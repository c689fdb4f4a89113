"""The processes of a command: those of a job that torchrun or srun started, or one per GPU that it starts itself."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from d2distill.common.engine.cli import debugging, exit_with_error, user_errors, user_message
from d2distill.common.engine.job import Job
from d2distill.common.errors import ConfigError


@contextmanager
def join_job() -> Iterator[None]:
    """Take part in the job that torchrun, or srun with several tasks, started; does nothing if none did.

    A user error inside is printed by the first rank that has it. The others, where it occurs too or where communication
    then fails, exit silently with the same code 2: one line in all. torchrun adds its own report and exits with 1; no
    worker can prevent that.
    """
    job = Job.from_environ()
    if job is None:
        yield
        return
    os.environ.update(MASTER_ADDR=job.master_addr, MASTER_PORT=str(job.master_port))
    store = next(dist.rendezvous("env://", job.rank, job.world_size))[0]
    try:
        with _one_error(store):
            init_distributed(job, store)
            yield
            # No rank leaves while others still communicate with it.
            comm.synchronize()
    finally:
        comm._LOCAL_PROCESS_GROUP = None
        if dist.is_initialized():
            dist.destroy_process_group()


def processes_to_start(num_gpus: int, num_machines: int = 1) -> int:
    """How many processes :func:`launch` has to start here; 0 if this one is enough, or is one of a job."""
    if dist.is_initialized():
        return 0
    found = torch.cuda.device_count()
    if num_gpus > max(found, 1):
        raise ConfigError(
            f"--num-gpus {num_gpus}, but this machine has {found} GPU{'s' * (found != 1)}; "
            "for several processes on CPUs use torchrun --nproc-per-node N"
        )
    return max(num_gpus, 1) if num_gpus > 1 or num_machines > 1 else 0


def launch(
    main: Callable[..., object],
    arguments: tuple[Any, ...],
    processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> None:
    """Run ``main(*arguments)`` in processes that Detectron2 starts, one per GPU of this machine."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    signal.signal(signal.SIGTERM, forward_sigterm)
    try:
        detectron2_launch(_child, processes, num_machines, machine_rank, dist_url, args=(store.port, main, *arguments))
    except ProcessExitedException as error:
        # The process has printed why; torch would add a traceback of this one.
        raise SystemExit(error.exit_code if error.exit_code >= 0 else 128 - error.exit_code) from None


def forward_sigterm(*_: Any) -> None:
    """Signal handler: the child processes save and exit, and this one waits for them."""
    for child in multiprocessing.active_children():
        child.terminate()


def init_distributed(job: Job, store: dist.Store) -> None:
    """Initialize torch.distributed and Detectron2's `comm` for this process of a job."""
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=job.rank, world_size=job.world_size)
    # Detectron2's own function takes nodes in order and of one size only.
    nodes = comm.all_gather(job.node)
    if gpu:
        torch.cuda.set_device(job.device_index(torch.cuda.device_count(), nodes.count(job.node)))
    for node in sorted(set(nodes)):
        group = dist.new_group([rank for rank, other in enumerate(nodes) if other == node])
        if node == job.node:
            comm._LOCAL_PROCESS_GROUP = group


def _child(port: int, main: Callable[..., object], *arguments: object) -> None:
    # Errors are printed by the process that has them: torch would add tracebacks.
    try:
        with user_errors(), _one_error(dist.TCPStore("127.0.0.1", port, is_master=False)):
            main(*arguments)
    except SystemExit as end:
        # Threads of torch's stores may abort the interpreter's end, which would replace the exit code by SIGABRT's.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


@contextmanager
def _one_error(store: dist.Store) -> Iterator[None]:
    """End this process after a user error, and print it if no process of this `store` had one before."""
    try:
        yield
    except Exception as error:
        mine = user_message(error) is not None
        try:
            earlier = store.add("d2distill_user_errors", int(mine)) > mine
        except dist.DistError:
            earlier = True  # the rank that hosts the store has ended, and printed why
        if earlier:
            time.sleep(1)  # the end of this process may be the end of all: the first one prints before
            if not mine and not debugging():
                raise SystemExit(2) from None  # a consequence of the other's end
        exit_with_error(error, silent=earlier)
