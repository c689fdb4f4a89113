"""Starting processes, and ending commands with one clear line where the user can mend something."""

import argparse
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from d2distill.common.engine.job import Job
from d2distill.common.errors import ConfigError, UserError

__all__ = ["command", "launch"]


def command(main: Callable[[], None]) -> None:
    """Run a command line's `main`; an error that the user can mend is printed without a traceback, exit code 2.

    After Ctrl-C the code is 130, as a shell has it.
    """
    # A full disk is said once, by what cannot do without it, and not by every line of a log.
    logging.raiseExceptions = False
    try:
        main()
    except (UserError, FileNotFoundError) as error:
        _end(str(error))
    except OSError as error:
        if error.filename is None:  # of no file of the user's
            raise
        _end(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _end(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2) from None


def launch(main: Callable[..., None], args: argparse.Namespace, *arguments: object) -> None:
    """Run ``main(*arguments)`` in every process of the job.

    Under torchrun, and under srun with several tasks, this process is one of them; else Detectron2 starts
    ``args.num_gpus`` of them (0 or 1: none, it runs here, on the CPU if there is no GPU).

    Raises:
        ConfigError: more GPUs are asked for than exist.
        SystemExit: of a process that was started here, with its exit code.
    """
    job = Job.of()
    if job is not None:
        _join(job)
        try:
            main(*arguments)
            # None leaves while the others still talk to it.
            comm.synchronize()
        finally:
            comm._LOCAL_PROCESS_GROUP = None
            dist.destroy_process_group()
        return
    found = torch.cuda.device_count()
    if args.num_gpus > max(found, 1):
        raise ConfigError(
            f"--num-gpus {args.num_gpus}, but this machine has {found} GPU{'s' * (found != 1)}; "
            "for several processes on CPUs use torchrun --nproc-per-node N"
        )
    if args.num_gpus > 1:
        signal.signal(signal.SIGTERM, _pass_on)
    try:
        detectron2_launch(
            _Child(main),
            max(args.num_gpus, 1),
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=arguments,
        )
    except ProcessExitedException as error:
        # The process has said why; what torch knows about it adds nothing.
        raise SystemExit(error.exit_code if error.exit_code >= 0 else 128 - error.exit_code) from None


class _Child:
    """`main`, with its errors for the user printed in the process that has them: torch would add a traceback."""

    def __init__(self, main: Callable[..., None]) -> None:
        self.main = main

    def __call__(self, *arguments: object) -> None:
        if comm.get_world_size() == 1:
            self.main(*arguments)
        else:
            command(lambda: self.main(*arguments))


def _pass_on(number: int, frame: FrameType | None) -> None:
    # The processes save and exit; this one waits for them.
    for child in multiprocessing.active_children():
        child.terminate()


def _join(job: Job) -> None:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(job.device_index(torch.cuda.device_count()))
    os.environ.update(MASTER_ADDR=job.address, MASTER_PORT=str(job.port))
    dist.init_process_group("nccl" if gpu else "gloo", rank=job.rank, world_size=job.world_size)
    # Detectron2's own function takes nodes in order and of one size only.
    nodes = comm.all_gather(job.node)
    for node in sorted(set(nodes)):
        group = dist.new_group([rank for rank, where in enumerate(nodes) if where == node])
        if node == job.node:
            comm._LOCAL_PROCESS_GROUP = group
