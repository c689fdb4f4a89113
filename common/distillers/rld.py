"""Distillation with logits that the labels refine."""

from torch import Tensor
from torch.nn import functional as F

from d2distill.common.distillers._numerics import (
    HIDDEN,
    kl_per_sample,
    log_binary,
    log_softmax_of_others,
    safe_mean,
    upcast,
)
from d2distill.common.distillers.base import DISTILLERS, LogitDistiller
from d2distill.common.outputs import Batch, Outputs

__all__ = ["RLD", "rld_loss"]


def rld_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    alpha_temperature: float,
    temperature: float,
) -> Tensor:
    """The teacher's confidence, moved to the right class, and its relations among the classes it ranks below that.

    Sun et al.: Knowledge Distillation with Refined Logits, ICCV 2025, arXiv:2408.07703.

        mean over samples of
            alpha * Ta^2 * KL((p_t[m], 1 - p_t[m]) || (p_s[y], 1 - p_s[y])),   p at Ta, m the teacher's top class
          + beta  * T^2  * KL(q_t || q_s),   q at T, over the classes whose teacher logit is below that of y

    The second part is 0 for a sample with fewer than two such classes.

    Args:
        logits_student, logits_teacher: (N, C), C >= 2.
        target: (N,) class y of each sample.
        alpha, beta: weights of the two parts.
        alpha_temperature, temperature: Ta > 0 and T > 0.
    """
    confidence = alpha * _confidence_part(logits_student, logits_teacher, target, alpha_temperature)
    return confidence + beta * _correlation_part(logits_student, logits_teacher, target, temperature)


def _confidence_part(logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    student, teacher = upcast(logits_student), upcast(logits_teacher).detach()
    pairs = (
        log_binary(z, chosen, log_softmax_of_others(z, chosen, temperature), temperature)
        for z, chosen in ((student, target), (teacher, teacher.argmax(1)))
    )
    return temperature**2 * safe_mean(kl_per_sample(*pairs))


def _correlation_part(logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    student, teacher = upcast(logits_student), upcast(logits_teacher).detach()
    # As numbers: on a CPU ten times faster than masked_fill, whose branches follow the mask.
    kept = (teacher < teacher.gather(1, target[:, None])).to(teacher.dtype)

    def log_softmax_of_kept(logits: Tensor) -> Tensor:
        # A row of nothing but hidden classes is uniform, in both networks.
        return F.log_softmax((logits / temperature * kept).sub_(kept - 1, alpha=HIDDEN), dim=1)

    log_student, log_teacher = map(log_softmax_of_kept, (student, teacher))
    # kl_per_sample(), but for its exponential, which is slow where it underflows: here for all hidden classes.
    return -(temperature**2) * safe_mean(((log_student - log_teacher) * F.softmax(log_teacher, dim=1)).sum(1))


@DISTILLERS.register()
class RLD(LogitDistiller):
    """`rld_loss` on the class logits."""

    takes_soft_target = False

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WARMUP": 20,
            # Weight of the confidence.
            "ALPHA": 1.0,
            # Weight of the relations among the classes below the right one. Per pair as in DKD.
            "BETA": 8.0,
            # Temperature of the confidence.
            "ALPHA_T": 1.0,
            # Temperature of the relations. ImageNet: 1.
            "T": 4.0,
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        # The two parts have temperatures of their own, at which several teachers are averaged.
        cfg, logits = self.cfg, self.student_logits(student)
        confidence = _confidence_part(logits, self.teacher_logits(teacher, cfg.ALPHA_T), batch.target, cfg.ALPHA_T)
        correlation = _correlation_part(logits, self.teacher_logits(teacher, cfg.T), batch.target, cfg.T)
        return cfg.ALPHA * confidence + cfg.BETA * correlation
