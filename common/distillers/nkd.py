"""Normalized distillation: soft cross-entropies of the target class and of the others among themselves."""

from torch import Tensor
from torch.nn import functional as F

from d2distill.common.distillers._numerics import log_softmax_of_others, safe_mean, upcast
from d2distill.common.distillers.base import DISTILLERS, LogitDistiller
from d2distill.common.outputs import Batch, Outputs

__all__ = ["NKD", "nkd_loss"]


def nkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, gamma: float, temperature: float
) -> Tensor:
    """The target's log-probability weighted by the teacher's, and the cross-entropy of the other classes.

    Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
    and Customized Soft Labels, ICCV 2023, arXiv:2303.13005, equation 7.

        - mean over samples of ( p_t[y] * log p_s[y]  +  gamma * T^2 * sum over c != y of q_t[c] * log q_s[c] )

    with p the softmax of the logits, and q the softmax of logits / T over the classes other than y.

    Args:
        logits_student, logits_teacher: (N, C), C >= 2. With C = 2 the second part is 0: one other class has q = 1.
        target: (N,) class y of each sample.
        gamma: weight of the other classes.
        temperature: T > 0, of the other classes alone.
    """
    target_part = _target_part(logits_student, logits_teacher, target)
    return target_part + gamma * _other_part(logits_student, logits_teacher, target, temperature)


def _target_part(logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> Tensor:
    p_teacher = F.softmax(upcast(logits_teacher).detach(), dim=1).gather(1, target[:, None])
    return -safe_mean(p_teacher * F.log_softmax(upcast(logits_student), dim=1).gather(1, target[:, None]))


def _other_part(logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    networks = logits_student, logits_teacher.detach()
    log_q_student, log_q_teacher = (log_softmax_of_others(upcast(z), target, temperature) for z in networks)
    return -(temperature**2) * safe_mean((log_q_teacher.exp() * log_q_student).sum(1))


@DISTILLERS.register()
class NKD(LogitDistiller):
    """`nkd_loss` on the class logits, with the paper's CIFAR settings; ImageNet has gamma 1.5 and T 1."""

    takes_soft_target = False

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            # Weight of the other classes. ImageNet: 1.5.
            "GAMMA": 3.5,
            # Temperature of the other classes; the target's is 1. ImageNet: 1.
            "T": 3.0,
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        # The two parts have temperatures of their own, at which several teachers are averaged.
        logits, gamma, temperature = self.student_logits(student), self.cfg.GAMMA, self.cfg.T
        target_part = _target_part(logits, self.teacher_logits(teacher), batch.target)
        other_part = _other_part(logits, self.teacher_logits(teacher, temperature), batch.target, temperature)
        return target_part + gamma * other_part
