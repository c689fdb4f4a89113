"""Starting processes, and ending commands with one clear line where the user can mend something."""

import argparse
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm

from common.errors import ConfigError, UserError

__all__ = ["command", "launch"]


def command(main: Callable[[], None]) -> None:
    """Run a command line's `main`; an error that the user can mend is printed without a traceback, exit code 2."""
    try:
        main()
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def launch(main: Callable[..., None], args: argparse.Namespace, *arguments: object) -> None:
    """Run ``main(*arguments)`` in every process of the job.

    Under torchrun this process is one of them; else Detectron2 starts ``args.num_gpus`` of them
    (0 or 1: none, it runs here, on the CPU if there is no GPU).

    Raises:
        ConfigError: more GPUs are asked for than exist.
    """
    if all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")):
        _join_torchrun()
        try:
            main(*arguments)
        finally:
            dist.destroy_process_group()
        return
    found = torch.cuda.device_count()
    if args.num_gpus > max(found, 1):
        raise ConfigError(
            f"--num-gpus {args.num_gpus}, but this machine has {found} GPU{'s' * (found != 1)}; "
            "for several processes on CPUs use torchrun --nproc-per-node N"
        )
    detectron2_launch(
        main,
        max(args.num_gpus, 1),
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=arguments,
    )


def _join_torchrun() -> None:
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        if local_size > torch.cuda.device_count():
            raise ConfigError(
                f"torchrun starts {local_size} processes here, but there are {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    comm.create_local_process_group(local_size)
