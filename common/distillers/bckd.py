"""Binary classification distillation, for class scores that are independent sigmoids."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from d2distill.common.distillers._numerics import safe_mean, upcast
from d2distill.common.distillers.base import DISTILLERS, LogitDistiller
from d2distill.common.outputs import Batch, Outputs

__all__ = ["BCKD", "bckd_loss"]


def bckd_loss(logits_student: Tensor, logits_teacher: Tensor, target: Tensor | None) -> Tensor:
    """Each class of each row as a binary problem, weighted by how far the networks are apart in it.

    Yang et al.: Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection, ICCV 2023,
    arXiv:2308.14286.

        1 / F * sum over rows and classes of |p_t - p_s| * BCE,   p = sigmoid(logits)
        BCE = - p_t * log p_s - (1 - p_t) * log(1 - p_s)

    with F the number of foreground rows, at least 1. As in the authors' code (mmdet/models/losses/kd_loss.py of
    TinyTigerPan/BCKD): the weight has a gradient to the student too; BCE keeps the teacher's entropy, which the weight
    takes to 0 where both agree; rows that the detector ignores count for nothing.

    Two things are simpler than there. F is of this process's rows, so that with several processes the loss is the
    average of theirs, each over its own F; the authors divide all by the processes' mean. And they leave out the
    background of pyramid levels that have no foreground, but a row does not know its level.

    Args:
        logits_student, logits_teacher: (N, C), one row per anchor, or per image in classification.
        target: (N,) class of each row: 0 to C - 1 is foreground, C background, negative ignored. None for images with
            several classes: F is N.
    """
    student, p_teacher = upcast(logits_student), upcast(logits_teacher).detach().sigmoid()
    weight = (p_teacher - student.sigmoid()).abs()
    per_row = (weight * F.binary_cross_entropy_with_logits(student, p_teacher, reduction="none")).sum(1)
    if target is None:
        return safe_mean(per_row)
    counted = target >= 0
    foreground = (counted & (target < student.shape[1])).sum().clamp_min(1)
    return per_row.masked_fill(~counted, 0.0).sum() / foreground


@DISTILLERS.register()
class BCKD(LogitDistiller):
    """`bckd_loss` on the class logits, with the weight of the paper's detectors.

    It compares scores themselves, not their differences within a row: there is no STANDARDIZE, whose shift and scale
    of a row would turn the low scores of a background row into classes that are half there.

    The paper's other term, on the overlap of the boxes, is not part of it: it is no loss on logits.
    """

    takes_sigmoid = True

    def average(self, members: list[tuple[float, Tensor]], temperature: float) -> Tensor:
        """Logits (N, C) whose sigmoids are the weighted average of the sigmoids of each member's."""
        log_p, log_rest = (
            torch.stack([F.logsigmoid(sign * z) + math.log(weight) for weight, z in members if weight > 0]).logsumexp(0)
            for sign in (1, -1)
        )
        return log_p - log_rest

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return bckd_loss(self.student_logits(student), self.teacher_logits(teacher), batch.target)
