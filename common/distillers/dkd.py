"""Decoupled knowledge distillation."""

import torch
from torch import Tensor
from torch.nn import functional as F

from d2distill.common.distillers._numerics import batch_mean, kl_per_sample, upcast
from d2distill.common.distillers.base import DISTILLERS, LogitDistiller
from d2distill.common.outputs import Batch, Outputs

__all__ = ["DKD", "decoupled_kl", "dkd_loss"]


def decoupled_kl(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The target-class and the non-target-class part of the divergence, per sample.

    With p the target's probability and q the softmax over the other classes, of both networks at T:

        TCKD = KL of the pairs (p, 1 - p),   NCKD = KL of the q,   KD = TCKD + (1 - p_teacher) * NCKD

    All in log space: p is the sigmoid of the target's logit minus the log-sum-exp of the others, so neither p nor
    1 - p overflows or cancels.

    Args:
        logits_student, logits_teacher: (N, C), C >= 2. With C = 2 NCKD is 0: one other class has q = 1.
        target: (N,) class of each sample.
        temperature: T > 0.

    Returns:
        TCKD and NCKD, each (N,), without the factor T^2.

    Raises:
        ValueError: fewer than two classes.
    """
    if logits_student.shape[1] < 2:
        raise ValueError(f"the target is set against other classes, but the logits have {logits_student.shape[1]}")
    label = target[:, None]
    pairs, others = [], []
    for logits in (logits_student, logits_teacher.detach()):
        scaled = upcast(logits) / temperature
        rest = scaled.scatter(1, label, -torch.inf)
        odds = scaled.gather(1, label)[:, 0] - rest.logsumexp(1)
        pairs.append(torch.stack([F.logsigmoid(odds), F.logsigmoid(-odds)], dim=1))
        # The target's column becomes log 1 on both sides: it adds 0 where -inf - -inf would be NaN.
        others.append(F.log_softmax(rest, dim=1).scatter(1, label, 0.0))
    return kl_per_sample(*pairs), kl_per_sample(*others)


def dkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Decoupled distillation loss.

    Zhao et al.: Decoupled Knowledge Distillation, CVPR 2022, arXiv:2203.08679, equation 7.

        T^2 * mean over samples of (alpha * TCKD + beta * NCKD), the parts of :func:`decoupled_kl`

    Args:
        logits_student, logits_teacher: (N, C), C >= 2.
        target: (N,) class of each sample.
        alpha, beta: weights of the target-class and the non-target-class part.
        temperature: T > 0.

    Returns:
        0-d tensor; 0 for an empty batch. No gradient reaches the teacher.

    Raises:
        ValueError: fewer than two classes.
    """
    target_part, other_part = decoupled_kl(logits_student, logits_teacher, target, temperature)
    return temperature**2 * batch_mean(alpha * target_part + beta * other_part)


@DISTILLERS.register()
class DKD(LogitDistiller):
    """`dkd_loss` on the class logits."""

    takes_soft_target = False

    @classmethod
    def defaults(cls) -> dict[str, float]:
        return {"WARMUP": 20, "ALPHA": 1.0, "BETA": 8.0, "T": 4.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        cfg = self.cfg
        logits_student, logits_teacher = self.student_logits(student), self.teacher_logits(teacher, cfg.T)
        return dkd_loss(logits_student, logits_teacher, batch.target, cfg.ALPHA, cfg.BETA, cfg.T)
