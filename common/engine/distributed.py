"""A training in a job of several processes: what its settings must fit, and the student's side of it."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from detectron2.engine.defaults import create_ddp_model
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from fvcore.common.config import CfgNode
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2distill.common.config import resolve_device
from d2distill.common.engine.peers import check_same_on_all_ranks
from d2distill.common.engine.settings import flat_settings
from d2distill.common.errors import ConfigError, UserError


def run_on_main_process(action: Callable[[], Any]) -> Any:
    """Do something in the main process alone, while the others wait, and return its result in all. All call it.

    Raises:
        UserError, OSError: in all processes, where the main one raises it: none waits for one that has ended.
    """
    result = error = None
    if comm.is_main_process():
        try:
            result = action()
        except (UserError, OSError) as own:
            error = own
    result, error = comm.all_gather((result, error))[0]
    if error is not None:
        raise error
    return result


def check_processes(cfg: CfgNode) -> None:
    """Check, at the start of a training, that this job's processes have one configuration, which fits their number."""
    check_same_on_all_ranks(flat_settings(cfg))
    batch, processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if batch % processes:
        raise ConfigError(f"SOLVER.IMS_PER_BATCH {batch} cannot be shared out evenly over {processes} processes")
    device, here = resolve_device(cfg), comm.get_local_size()
    # Without a number each process has its own: launch() has set it. One process per machine may name it.
    if device.type == "cuda" and device.index is not None and here > 1:
        raise ConfigError(
            f"MODEL.DEVICE is {device}, which the {here} processes on this machine would share; "
            "use cuda or auto: each then takes a GPU of its own"
        )


def wrap_student(model: nn.Module, **options: Any) -> nn.Module:
    """`model` under DistributedDataParallel where there are several processes, its teacher and memories left out.

    The teacher is the same everywhere and never changes, and methods keep their own buffers equal: neither is sent.
    `options` are DistributedDataParallel's.
    """
    if comm.get_world_size() == 1:
        return model
    parameters, buffers = model.named_parameters(), model.named_buffers()
    ignored = [name for name, _ in parameters if name.startswith("teacher.")]
    ignored += [name for name, _ in buffers if not name.startswith("student.")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    device = next(model.parameters()).device
    return create_ddp_model(model, device_ids=[device.index] if device.type == "cuda" else None, **options)


def synchronize_batch_norms(network: nn.Module) -> bool:
    """Let the batch norms of a network, in place, take their statistics over all processes; names stay.

    Each process counts with the number of its samples, which may be 0. On CPUs, where torch has no such norm,
    Detectron2's keeps the biased variance in its running statistics.

    Returns:
        Whether there are any.

    Raises:
        ConfigError: a batch norm that does something else as well, on CPUs.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if next(network.parameters()).is_cuda:
        try:  # torch's norm with timm's care for its own norms that hold an activation
            from timm.layers import convert_sync_batchnorm as convert
        except ImportError:
            convert = nn.SyncBatchNorm.convert_sync_batchnorm
        convert(network)
        return bool(norms)
    for norm in norms:
        if type(norm) not in (nn.BatchNorm2d, NaiveSyncBatchNorm):
            raise ConfigError(f"MODEL.SYNC_BN: on CPUs the student's {type(norm).__name__} cannot be synchronized")
        norm.__class__, norm._stats_mode = NaiveSyncBatchNorm, "N"
    return bool(norms)


def broadcast_buffers(network: nn.Module) -> None:
    """Give every process the main one's buffers."""
    for buffer in network.buffers():
        dist.broadcast(buffer, 0)
