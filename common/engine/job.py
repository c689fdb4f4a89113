"""This process's rank in a job that torchrun or SLURM's srun started, read from the environment."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from d2distill.common.errors import ConfigError

__all__ = ["Job"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Job:
    """One process of a job.

    Attributes:
        rank, world_size: over all nodes.
        local_rank, local_size: on this node; nodes may differ in their size.
        node: a number that this node's processes share, and no others.
        master_addr, master_port: where rank 0 listens.
        launcher: what started the job, for messages.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    node: int
    master_addr: str
    master_port: int
    launcher: str = "torchrun"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "Job | None":
        """Read the job from environment variables; None for a process that was started by hand.

        torchrun's take precedence over SLURM's, so that torchrun works under srun.

        Raises:
            ConfigError: SLURM's variables are incomplete or contradict each other.
        """
        if all(name in environ for name in _TORCHRUN):
            rank, world_size, local_rank, local_size = (int(environ[name]) for name in _TORCHRUN[:4])
            # Without it: the rank of the node's first process, which is unique whatever the nodes' sizes.
            node = int(environ.get("GROUP_RANK", rank - local_rank))
            return cls(
                rank, world_size, local_rank, local_size, node, environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
            )
        # A batch script without srun has the number of tasks as well, but is not one of them.
        in_step = "SLURM_STEP_ID" in environ or "SLURM_LAUNCH_NODE_IPADDR" in environ
        size = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
        return cls._of_slurm(environ, size) if in_step and size > 1 and "SLURM_PROCID" in environ else None

    @classmethod
    def _of_slurm(cls, environ: Mapping[str, str], size: int) -> "Job":
        rank, local_rank = int(environ["SLURM_PROCID"]), int(environ.get("SLURM_LOCALID", 0))
        node = int(environ.get("SLURM_NODEID", 0))
        sizes = _tasks_per_node(environ, size)
        if node >= len(sizes) or sum(sizes) != size or not 0 <= rank < size or not 0 <= local_rank < sizes[node]:
            raise ConfigError(
                f"SLURM's variables contradict each other: task {rank} of {size}, {local_rank} on node {node}, and "
                f"{sizes} tasks on the nodes; start with srun, or with torchrun"
            )
        return cls(rank, size, local_rank, sizes[node], node, _master_addr(environ), _master_port(environ), "srun")

    def device_index(self, visible: int, environ: Mapping[str, str] = os.environ) -> int:
        """The GPU of this process among the `visible` ones; srun may show each process its own GPU only.

        Raises:
            ConfigError: more processes on this node than GPUs.
        """
        gpus = visible
        if self.launcher == "srun" and visible == 1:  # --gpus-per-task
            gpus = int(environ.get("SLURM_GPUS_ON_NODE") or self.local_size)
        if self.local_size > gpus:
            raise ConfigError(
                f"{self.launcher} starts {self.local_size} processes on this node, but it has {gpus} GPU"
                f"{'s' * (gpus != 1)}: start one process per GPU"
            )
        return self.local_rank % visible


def _tasks_per_node(environ: Mapping[str, str], size: int) -> list[int]:
    """Of SLURM's "2(x3),1": [2, 2, 2, 1]."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(size)
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]


def _master_addr(environ: Mapping[str, str]) -> str:
    """The node of task 0, which need not be the one where srun was typed (a login node)."""
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    # Of "gpu[003-010,12]-ib,other" the first: gpu003-ib.
    first = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^\[,]*)", nodes)
    address = "".join(part or "" for part in first.groups()) or environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if not address:
        raise ConfigError("SLURM does not say where task 0 runs (SLURM_STEP_NODELIST); set MASTER_ADDR")
    return address


def _master_port(environ: Mapping[str, str]) -> int:
    """A port that differs between jobs and steps, below the ephemeral range."""
    if environ.get("MASTER_PORT"):
        return int(environ["MASTER_PORT"])
    step = environ.get("SLURM_STEP_ID", "0")
    return 20000 + (17 * int(environ.get("SLURM_JOB_ID", 0)) + int(step if step.isdigit() else 0)) % 10000
