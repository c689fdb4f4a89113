"""An optimiser that treats the task's and the distillation's gradients apart."""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["DOT"]


class DOT(torch.optim.Optimizer):
    """Distillation-Oriented Trainer: SGD with a momentum buffer for each of two gradients.

    Zhao et al.: DOT: A Distillation-Oriented Trainer, ICCV 2023.

        v_task    <- (momentum - delta) v_task    + g_task + weight_decay * p
        v_distill <- (momentum + delta) v_distill + g_distill
        p         <- p - lr (v_task + v_distill)

    A parameter that only one of the two losses reaches uses `momentum`, and decays under that one.

    Args:
        params: parameters or groups of them.
        lr, momentum, weight_decay: as in SGD.
        delta: how much the distillation dominates, 0 <= delta < momentum. With 0 this is SGD on the sum.
    """

    def __init__(
        self, params, lr: float, momentum: float = 0.9, delta: float = 0.075, weight_decay: float = 0.0
    ) -> None:
        if not 0 <= delta < momentum or momentum + delta >= 1:
            raise ValueError(f"needs 0 <= delta < momentum and momentum + delta < 1, got {delta} and {momentum}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})
        self._distill: dict[Tensor, Tensor] = {}

    def backward(self, task_loss: Tensor, distill_loss: Tensor) -> None:
        """Both gradients from one forward pass, averaged over the processes. The task's goes to ``p.grad``.

        Takes the place of ``backward()`` on a model that is not wrapped by DistributedDataParallel, whose
        reducer knows one gradient only.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        distill = torch.autograd.grad(distill_loss, params, retain_graph=True, allow_unused=True)
        task = torch.autograd.grad(task_loss, params, allow_unused=True)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for gradient in (*task, *distill):
                if gradient is not None:
                    dist.all_reduce(gradient)
                    gradient /= dist.get_world_size()
        self._distill = {p: g for p, g in zip(params, distill, strict=True) if g is not None}
        for p, gradient in zip(params, task, strict=True):
            p.grad = gradient

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Apply the gradients of the last :meth:`backward`."""
        for group in self.param_groups:
            momentum, delta, decay = group["momentum"], group["delta"], group["weight_decay"]
            for p in group["params"]:
                gradients = {"task": p.grad, "distill": self._distill.get(p)}
                reached = [name for name, gradient in gradients.items() if gradient is not None]
                update = torch.zeros_like(p) if reached else None
                for name in reached:
                    factor = momentum
                    if len(reached) == 2:
                        factor += delta if name == "distill" else -delta
                    gradient = gradients[name]
                    if decay and (name == "task" or len(reached) == 1):
                        gradient = gradient.add(p, alpha=decay)
                    buffer = self.state[p].setdefault(name, torch.zeros_like(p))
                    update += buffer.mul_(factor).add_(gradient)
                if reached:
                    p.add_(update, alpha=-group["lr"])
        self._distill = {}
