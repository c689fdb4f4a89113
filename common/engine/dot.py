"""An optimizer that keeps the task's and the distillation's gradient apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor


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
        self, params: Any, lr: float, momentum: float = 0.9, delta: float = 0.075, weight_decay: float = 0.0
    ) -> None:
        if not 0 <= delta < momentum or momentum + delta >= 1:
            raise ValueError(f"needs 0 <= delta < momentum and momentum + delta < 1, got {delta} and {momentum}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})
        self._distill: dict[Tensor, Tensor] = {}

    def backward(self, task: Mapping[str, Tensor], distill: Mapping[str, Tensor]) -> None:
        """Both gradients from one forward pass, averaged over the processes. The task's goes to ``p.grad``.

        The model is not wrapped by DistributedDataParallel, whose reducer knows one gradient only.

        Args:
            task, distill: the losses of the two kinds, by name.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        distill_gradients = torch.autograd.grad(sum(distill.values()), params, retain_graph=True, allow_unused=True)
        task_gradients = torch.autograd.grad(sum(task.values()), params, allow_unused=True)
        task_gradients, distill_gradients = _average_over_ranks([task_gradients, distill_gradients])
        self._distill = {p: g for p, g in zip(params, distill_gradients, strict=True) if g is not None}
        for p, gradient in zip(params, task_gradients, strict=True):
            p.grad = gradient

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Apply the gradients of the last :meth:`backward`."""
        for group in self.param_groups:
            momentum, delta, decay = group["momentum"], group["delta"], group["weight_decay"]
            for p in group["params"]:
                gradients = {"task": p.grad, "distill": self._distill.get(p)}
                gradients = {name: gradient for name, gradient in gradients.items() if gradient is not None}
                shift = {"task": -delta, "distill": delta} if len(gradients) == 2 else {}
                for name, gradient in gradients.items():
                    if decay and (name == "task" or len(gradients) == 1):
                        gradient = gradient.add(p, alpha=decay)
                    if name in self.state[p]:
                        self.state[p][name].mul_(momentum + shift.get(name, 0)).add_(gradient)
                    else:
                        self.state[p][name] = gradient.clone(memory_format=torch.preserve_format)
                if gradients:
                    p.add_(sum(self.state[p][name] for name in gradients), alpha=-group["lr"])
        self._distill = {}


def _average_over_ranks(gradients: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
    """The means over all processes of lists of gradients, in one exchange per type of number."""
    result = [list(part) for part in gradients]
    if comm.get_world_size() == 1:
        return result
    places = [(part, j) for part in result for j, gradient in enumerate(part) if gradient is not None]
    for dtype in dict.fromkeys(part[j].dtype for part, j in places):  # in the same order everywhere
        chosen = [(part, j) for part, j in places if part[j].dtype == dtype]
        # Contiguous: autograd may give expanded views.
        flat = torch.cat([part[j].reshape(-1) for part, j in chosen])
        dist.all_reduce(flat)
        flat /= comm.get_world_size()
        for (part, j), values in zip(chosen, flat.split([part[j].numel() for part, j in chosen]), strict=True):
            part[j] = values.view(part[j].shape)
    return result
