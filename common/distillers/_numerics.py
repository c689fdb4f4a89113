"""Arithmetic that the loss files share."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__: list[str] = []


def upcast(tensor: Tensor) -> Tensor:
    """Half precision becomes fp32, where a sum over classes or pixels keeps its digits; fp64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def batch_mean(per_sample: Tensor) -> Tensor:
    """Mean over axis 0; 0, with a graph, for an empty batch."""
    return per_sample.sum() / max(per_sample.shape[0], 1)


def element_mean(tensor: Tensor) -> Tensor:
    """Mean over all elements; 0, with a graph, where there are none."""
    return tensor.sum() / max(tensor.numel(), 1)


def l2_normalize(tensor: Tensor, dim: int, eps: float = 1e-12) -> Tensor:
    """Divide by the L2 norm along `dim`. Where that is at most `eps` the direction is undefined: 0, without gradient.

    (With ``F.normalize`` such a slice, a dead channel say, has gradients that are 1 / eps times too large.)
    """
    norm = torch.linalg.vector_norm(tensor, dim=dim, keepdim=True)
    return torch.where(norm > eps, tensor / norm.clamp_min(eps), torch.zeros_like(tensor))


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all elements in at least fp32; 0 where there are none. The teacher is detached."""
    student, teacher = upcast(student), upcast(teacher).detach()
    return F.mse_loss(student, teacher, reduction="sum") / max(student.numel(), 1)


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast off on the tensor's device: it would turn fp32 matrix products back into half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def kl_per_sample(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities (N, C), summed over classes: (N,)."""
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)


def zero_mean(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Values minus their mean over `dim`; 0, without a gradient, where they are constant.

    What rounding leaves of constant values has no direction, and would become one when divided by its norm.
    """
    difference = values - values.mean(dim, keepdim=True)
    norm, size = (torch.linalg.vector_norm(part, dim=dim, keepdim=True) for part in (difference, values))
    return difference.masked_fill(norm <= 8 * torch.finfo(values.dtype).eps * size, 0.0)
