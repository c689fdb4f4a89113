"""Decoupled knowledge distillation."""

from torch import Tensor

from d2distill.common.distillers._numerics import kl_per_sample, log_binary, log_softmax_of_others, safe_mean, upcast
from d2distill.common.distillers.base import DISTILLERS, LogitDistiller
from d2distill.common.outputs import Batch, Outputs

__all__ = ["DKD", "decoupled_kl", "dkd_loss"]


def decoupled_kl(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The target-class and the non-target-class part of the divergence, per sample.

    With p the target's probability and q the softmax over the other classes, of both networks at T:

        TCKD = KL of the pairs (p, 1 - p),   NCKD = KL of the q,   KD = TCKD + (1 - p_teacher) * NCKD

    Args:
        logits_student, logits_teacher: (N, C), C >= 2. With C = 2 NCKD is 0: one other class has q = 1.
        target: (N,) class of each sample.
        temperature: T > 0.

    Returns:
        TCKD and NCKD, each (N,), without the factor T^2.
    """
    networks = [upcast(logits) for logits in (logits_student, logits_teacher.detach())]
    others = [log_softmax_of_others(logits, target, temperature) for logits in networks]
    pairs = [log_binary(z, target, log_q, temperature) for z, log_q in zip(networks, others, strict=True)]
    return kl_per_sample(*pairs), kl_per_sample(*others)


def dkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Decoupled distillation loss.

    Zhao et al.: Decoupled Knowledge Distillation, CVPR 2022, arXiv:2203.08679, equation 7.

        T^2 * mean over samples of (alpha * TCKD + beta * NCKD), the parts of `decoupled_kl`

    Args:
        logits_student, logits_teacher: (N, C), C >= 2.
        target: (N,) class of each sample.
        alpha, beta: weights of the target-class and the non-target-class part.
        temperature: T > 0.
    """
    target_part, other_part = decoupled_kl(logits_student, logits_teacher, target, temperature)
    return temperature**2 * safe_mean(alpha * target_part + beta * other_part)


@DISTILLERS.register()
class DKD(LogitDistiller):
    """`dkd_loss` on the class logits."""

    takes_soft_target = False

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WARMUP": 20,
            # Weight of the target class.
            "ALPHA": 1.0,
            # Weight of the other classes. The paper chooses it per pair: 2, 6 or 8 on CIFAR-100, 0.5 or 2 on ImageNet.
            "BETA": 8.0,
            # Temperature. ImageNet: 1.
            "T": 4.0,
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        cfg = self.cfg
        logits_student, logits_teacher = self.student_logits(student), self.teacher_logits(teacher, cfg.T)
        return dkd_loss(logits_student, logits_teacher, batch.target, cfg.ALPHA, cfg.BETA, cfg.T)
