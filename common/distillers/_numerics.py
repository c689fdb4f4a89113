"""Arithmetic that the loss files share."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__: list[str] = []


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision becomes fp32, where a sum over classes or pixels keeps its digits; fp64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def batch_mean(per_sample: Tensor) -> Tensor:
    """Mean over axis 0; 0, with a graph, for an empty batch."""
    return per_sample.sum() / max(per_sample.shape[0], 1)


def kl_per_sample(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities (N, C), summed over classes: (N,)."""
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)


def centred(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Values minus their mean over `dim`; 0, without a gradient, where they are constant.

    What rounding leaves of constant values has no direction, and would become one when divided by its norm.
    """
    difference = values - values.mean(dim, keepdim=True)
    norm, size = (torch.linalg.vector_norm(part, dim=dim, keepdim=True) for part in (difference, values))
    return difference.masked_fill(norm <= 8 * torch.finfo(values.dtype).eps * size, 0.0)
