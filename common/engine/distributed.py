"""The student's side of a job of several processes."""

import torch.distributed as dist
from detectron2.engine.defaults import create_ddp_model
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["broadcast_buffers", "synchronize_batch_norms", "wrap_student"]


def wrap_student(model: nn.Module) -> nn.Module:
    """`model` under DistributedDataParallel where there are several processes, its teacher and memories left out.

    The teacher is the same everywhere and never changes, and methods keep their own buffers equal: neither is sent.
    """
    if comm.get_world_size() == 1:
        return model
    parameters, buffers = model.named_parameters(), model.named_buffers()
    ignored = [name for name, _ in parameters if name.startswith("teacher.")]
    ignored += [name for name, _ in buffers if not name.startswith("student.")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    device = next(model.parameters()).device
    return create_ddp_model(model, device_ids=[device.index] if device.type == "cuda" else None)


def synchronize_batch_norms(network: nn.Module) -> None:
    """Let the batch norms of a network, in place, take their statistics over all processes; names stay."""
    for module in network.modules():
        for name, child in module.named_children():
            # torch's own takes GPU tensors only.
            if isinstance(child, nn.BatchNorm2d) and not isinstance(child, NaiveSyncBatchNorm):
                if next(child.parameters()).is_cuda:
                    setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
                else:
                    child.__class__, child._stats_mode = NaiveSyncBatchNorm, "N"


def broadcast_buffers(network: nn.Module) -> None:
    """Give every process the main one's buffers."""
    for buffer in network.buffers():
        dist.broadcast(buffer, 0)
