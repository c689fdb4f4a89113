"""Distillation of relations between classes and between samples."""

from torch import Tensor
from torch.nn import functional as F

from d2distill.common.distillers._numerics import centered, upcast
from d2distill.common.distillers.base import DISTILLERS, LogitDistiller
from d2distill.common.outputs import Batch, Outputs

__all__ = ["DIST", "dist_loss"]


def _correlation(x: Tensor, y: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    """Pearson correlation along `dim`; 0, without a gradient, where one of the two is constant."""
    (x, of_x), (y, of_y) = centered(x, dim), centered(y, dim)
    correlation = (x * y).sum(dim) / (x.norm(dim=dim) * y.norm(dim=dim) + eps)
    return correlation.masked_fill((of_x | of_y).squeeze(dim), 0.0)


def dist_loss(
    logits_student: Tensor, logits_teacher: Tensor, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """One minus the correlation of the two networks' predictions, over classes and over samples.

    Huang et al.: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv:2205.10536.

        T^2 * [ beta  * (1 - mean over samples of the correlation of their rows)
              + gamma * (1 - mean over classes of the correlation of their columns) ]

    of the two (N, C) matrices softmax(logits / T).

    Args:
        logits_student, logits_teacher: (N, C).
        beta: weight of the relations between classes, within each sample.
        gamma: weight of the relations between samples, within each class. The columns of a single sample are
            constant: their part is then gamma, without a gradient.
        temperature: T > 0.
    """
    student = upcast(logits_student)
    if not len(student):
        return student.sum()
    student = F.softmax(student / temperature, dim=1)
    teacher = F.softmax(upcast(logits_teacher).detach() / temperature, dim=1)
    rows, columns = (1 - _correlation(student, teacher, dim).mean() for dim in (1, 0))
    return temperature**2 * (beta * rows + gamma * columns)


@DISTILLERS.register()
class DIST(LogitDistiller):
    """`dist_loss` on the class logits."""

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WEIGHT": 2.0,
            # Weight of the relations between classes, within each sample.
            "BETA": 1.0,
            # Weight of the relations between samples, within each class.
            "GAMMA": 1.0,
            # Temperature of the softmax of both networks.
            "T": 4.0,
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        logits_student, logits_teacher = self.student_logits(student), self.teacher_logits(teacher, self.cfg.T)
        return dist_loss(logits_student, logits_teacher, self.cfg.BETA, self.cfg.GAMMA, self.cfg.T)
