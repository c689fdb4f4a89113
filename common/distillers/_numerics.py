"""Arithmetic that the loss files share."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__: list[str] = []

#: A logit that counts for nothing: its probability is 0, and it is finite, where -inf would turn a product into NaN.
HIDDEN = -1e30


def upcast(tensor: Tensor) -> Tensor:
    """Half precision becomes fp32, where a sum over classes or pixels keeps its digits; fp64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast off on the tensor's device: it would turn fp32 matrix products back into half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def safe_mean(tensor: Tensor) -> Tensor:
    """Mean over all elements; 0, with a graph, where there are none."""
    return tensor.sum() / max(tensor.numel(), 1)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all elements in at least fp32; 0 where there are none. The teacher is detached."""
    return safe_mean(F.mse_loss(upcast(student), upcast(teacher).detach(), reduction="none"))


def kl_per_sample(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities (N, C), summed over classes: (N,)."""
    # The same numbers as F.kl_div's with log_target, whose backward pass has one more copy of the matrix.
    return -((log_student - log_teacher) * log_teacher.exp()).sum(1)


def log_softmax_of_others(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax (N, C) of logits / T over the classes other than the target, whose column is about `HIDDEN`.

    Raises:
        ValueError: fewer than two classes.
    """
    if logits.shape[1] < 2:
        raise ValueError(f"the target is set against other classes, but the logits have {logits.shape[1]}")
    return F.log_softmax((logits / temperature).scatter_(1, target[:, None], HIDDEN), dim=1)


def log_binary(logits: Tensor, target: Tensor, log_others: Tensor, temperature: float = 1.0) -> Tensor:
    """log p and log(1 - p) of each row's target, (N, 2): in log space, where neither overflows or cancels.

    Args:
        log_others: `log_softmax_of_others` of the same. It is fused, where a logsumexp is five passes over the logits:
            the sum of the others is found at the largest of them, whose logit and log-probability are known.
    """
    label, top = target[:, None], log_others.detach().argmax(1, keepdim=True)
    # The logits as they are given, and not their quotient, which need then not be kept for the backward pass.
    chosen = logits.gather(1, torch.cat([label, top], dim=1)) / temperature
    odds = chosen[:, 0] - chosen[:, 1] + log_others.gather(1, top)[:, 0]
    return torch.stack([F.logsigmoid(odds), F.logsigmoid(-odds)], dim=1)


def l2_normalize(tensor: Tensor, dim: int, eps: float = 1e-12) -> Tensor:
    """Divide by the L2 norm along `dim`. Where that is at most `eps` the direction is undefined: 0, without gradient.

    (With ``F.normalize`` such a slice, a dead channel say, has gradients that are 1 / eps times too large.)
    """
    norm = torch.linalg.vector_norm(tensor, dim=dim, keepdim=True)
    return tensor / torch.where(norm > eps, norm, torch.inf)


def zero_mean(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Values minus their mean over `dim`; 0, without a gradient, where they are constant."""
    difference, constant = centered(values, dim)
    return difference.masked_fill(constant, 0.0)


def centered(values: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Values minus their mean over `dim`, and where they are constant, of size 1 along `dim`.

    What rounding leaves of constant values has no direction, and would become one when divided by its norm.
    """
    difference = values - values.mean(dim, keepdim=True)
    norm, size = (torch.linalg.vector_norm(part.detach(), dim=dim, keepdim=True) for part in (difference, values))
    return difference, norm <= 8 * torch.finfo(values.dtype).eps * size


def standardize(values: Tensor, dim: tuple[int, ...], eps: float) -> Tensor:
    """Zero mean and unit (unbiased) deviation over `dim`; constant values become 0, without a gradient."""
    difference, count = zero_mean(values, dim), math.prod(values.shape[i] for i in dim)
    # The norm's gradient is 0 for constant values; that of a square root would be infinite.
    norm = torch.linalg.vector_norm(difference, dim=dim, keepdim=True)
    return difference / (norm / max(count - 1, 1) ** 0.5 + eps)
