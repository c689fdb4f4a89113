"""Knowledge distillation by softened class probabilities."""

from torch import Tensor
from torch.nn import functional as F

from d2distill.common.distillers._numerics import kl_per_sample, safe_mean, upcast
from d2distill.common.distillers.base import DISTILLERS, LogitDistiller
from d2distill.common.outputs import Batch, Outputs

__all__ = ["KD", "kd_loss"]


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened class distributions.

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv:1503.02531.

        T^2 * mean over samples of KL(softmax(t / T) || softmax(s / T)), summed over classes

    Args:
        logits_student, logits_teacher: (N, C).
        temperature: T > 0.
    """
    log_student = F.log_softmax(upcast(logits_student) / temperature, dim=1)
    log_teacher = F.log_softmax(upcast(logits_teacher).detach() / temperature, dim=1)
    return temperature**2 * safe_mean(kl_per_sample(log_student, log_teacher))


@DISTILLERS.register()
class KD(LogitDistiller):
    """`kd_loss` on the class logits. The paper's CIFAR setting gives the cross-entropy a weight of 0.1."""

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WEIGHT": 0.9,
            # Temperature. ImageNet: 1, with WEIGHT and CE_WEIGHT 0.5.
            "T": 4.0,
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        temperature = self.cfg.T
        return kd_loss(self.student_logits(student), self.teacher_logits(teacher, temperature), temperature)
