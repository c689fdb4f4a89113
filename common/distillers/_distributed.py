"""What a method needs to see the whole batch of a training over several processes."""

import torch
from torch import Tensor, distributed

__all__: list[str] = []


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def all_gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor's rows on all processes, in the order of their ranks, without a gradient.

    Args:
        tensors: of as many rows each; another process may have another number of them, or none.
    """
    if world_size() == 1:
        return tuple(tensor.detach() for tensor in tensors)
    count = torch.tensor([len(tensors[0])], device=tensors[0].device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    distributed.all_gather(counts, count)
    counts = torch.cat(counts).tolist()
    gathered = []
    for tensor in tensors:
        # Collectives take equal shapes.
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        gathered.append(torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]))
    return tuple(gathered)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor`, in place, over all processes."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor
