"""This process's rank in a job that torchrun or SLURM's srun started, read from the environment."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from d2distill.common.errors import ConfigError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Job:
    """One process of a job.

    Attributes:
        rank, world_size: over all nodes.
        local_rank: on this node; nodes may have different numbers of processes.
        node: a number that this node's processes share, and no others.
        master_addr, master_port: where rank 0 listens.
        launcher: what started the job, for messages.
    """

    rank: int
    world_size: int
    local_rank: int
    node: int
    master_addr: str
    master_port: int
    launcher: str = "torchrun"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "Job | None":
        """Read the job from environment variables; None for a process that was started by hand.

        torchrun's take precedence over SLURM's, so that torchrun works under srun.
        """
        if all(name in environ for name in _TORCHRUN):
            rank, world_size, local_rank, port = (_number(environ, name) for name in (*_TORCHRUN[:3], _TORCHRUN[4]))
            # The rank of a node's first process is unique, whatever the nodes' sizes.
            return cls(rank, world_size, local_rank, rank - local_rank, environ["MASTER_ADDR"], port)
        # A batch script without srun has the number of tasks as well, but is not one of them.
        in_step = "SLURM_STEP_ID" in environ or "SLURM_LAUNCH_NODE_IPADDR" in environ
        if not in_step or "SLURM_PROCID" not in environ:
            return None
        tasks = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
        world_size = _number(environ, tasks, "1")
        if world_size == 1:
            return None
        rank, local_rank, node = (_number(environ, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "NODEID"))
        return cls(rank, world_size, local_rank, node, _master_addr(environ), _master_port(environ), "srun")

    def __post_init__(self) -> None:
        if not 0 <= self.local_rank <= self.rank < self.world_size:
            raise ConfigError(
                f"{self.launcher} says that this is rank {self.rank} of {self.world_size}, number {self.local_rank} on "
                "its node, which cannot be: see RANK, WORLD_SIZE, LOCAL_RANK, or SLURM_PROCID, SLURM_NTASKS, "
                "SLURM_LOCALID in the environment"
            )
        if not 0 < self.master_port < 2**16:
            raise ConfigError(f"MASTER_PORT {self.master_port} in the environment is no port: choose one below 65536")

    def device_index(self, visible: int, local_size: int, environ: Mapping[str, str] = os.environ) -> int:
        """The GPU of this process, one of `local_size` on this node, among the `visible` ones.

        Raises:
            ConfigError: more processes on this node than GPUs.
        """
        gpus = visible
        if self.launcher == "srun" and visible == 1:  # by --gpus-per-task each process sees its own GPU only
            gpus = int(environ.get("SLURM_GPUS_ON_NODE") or local_size)
        if local_size > gpus:
            raise ConfigError(
                f"{self.launcher} starts {local_size} processes on this node, but it has {gpus} GPU"
                f"{'s' * (gpus != 1)}: start one process per GPU"
            )
        return self.local_rank % visible


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    value = environ.get(name) or default
    if not value.isdecimal():
        raise ConfigError(
            f"{name} in the environment is {value!r}, not a number: torchrun or srun sets it; start this by one of "
            "them, or unset it"
        )
    return int(value)


def _master_addr(environ: Mapping[str, str]) -> str:
    """The node of task 0, which need not be the one where srun was typed (a login node)."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    # Of "gpu[003-010,12]-ib,other" the first: gpu003-ib.
    first = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^\[,]*)", nodes)
    address = environ.get("MASTER_ADDR") or "".join(part or "" for part in first.groups())
    address = address or environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if not address:
        raise ConfigError("SLURM_STEP_NODELIST in the environment names no node: set MASTER_ADDR to that of rank 0")
    return address


def _master_port(environ: Mapping[str, str]) -> int:
    """A port that differs between jobs and steps, below the ephemeral range."""
    if environ.get("MASTER_PORT"):
        return _number(environ, "MASTER_PORT")
    job, step = _number(environ, "SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
    return 20000 + (17 * job + int(step if step.isdecimal() else 0)) % 10000
