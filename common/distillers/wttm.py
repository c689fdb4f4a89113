"""Weighted matching to the power-transformed teacher."""

from torch import Tensor
from torch.nn import functional as F

from d2distill.common.distillers._numerics import kl_per_sample, safe_mean, upcast
from d2distill.common.distillers.base import DISTILLERS, LogitDistiller
from d2distill.common.outputs import Batch, Outputs

__all__ = ["WTTM", "wttm_loss"]


def wttm_loss(logits_student: Tensor, logits_teacher: Tensor, gamma: float) -> Tensor:
    """Divergence from a softened teacher to the student as it is, more for samples whose teacher is unsure.

    Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024, arXiv:2402.11148.

        mean over samples of U * KL(p' || softmax(s)),   p' = p^gamma / U,   U = sum over classes of p^gamma

    with p = softmax(t), so that p' = softmax(gamma * t).

    Args:
        logits_student, logits_teacher: (N, C).
        gamma: exponent, the inverse of the teacher's temperature; in (0, 1] it softens.
    """
    log_student = F.log_softmax(upcast(logits_student), dim=1)
    log_power = gamma * F.log_softmax(upcast(logits_teacher).detach(), dim=1)
    log_weight = log_power.logsumexp(1)
    return safe_mean(log_weight.exp() * kl_per_sample(log_student, log_power - log_weight[:, None]))


@DISTILLERS.register()
class WTTM(LogitDistiller):
    """`wttm_loss` on the class logits, with the paper's settings of ResNet-32x4 and ResNet-8x4 on CIFAR-100.

    They belong together: U, which multiplies the loss, is up to C^(1 - GAMMA), 63 for 100 classes at GAMMA 0.1. The
    paper's table 8 has WEIGHT 1.5 to 4 for its pairs of one kind (GAMMA 0.1 to 0.3), and 33 to 101 at GAMMA 0.1 for the
    variant without U: so the 45 of the authors' README, whose command has ``--distill ttm``. Beside it stands the
    cross-entropy with weight 1.
    """

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WEIGHT": 3.0,
            # Exponent of the teacher's probabilities, 1 / T.
            "GAMMA": 0.1,
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return wttm_loss(self.student_logits(student), self.teacher_logits(teacher), self.cfg.GAMMA)
