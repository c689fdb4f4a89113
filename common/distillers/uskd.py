"""Self-distillation with soft labels that the student makes for itself."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2distill.common.distillers._numerics import log_softmax_of_others, no_autocast, safe_mean, upcast
from d2distill.common.distillers.base import DISTILLERS, Distiller
from d2distill.common.outputs import Batch, NetworkInfo, Outputs, TrainingData

__all__ = ["USKD", "uskd_loss", "zipf_labels"]


@torch.no_grad()
def zipf_labels(logits_student: Tensor, logits_weak: Tensor, target: Tensor) -> Tensor:
    """Soft labels of the classes other than the target, by the rank that the student gives them.

    The classes, the target among them, are ranked from high to low by

        w / (1 - w[y] + 1e-6)  +  log p / (1 - log p[y] + 1e-6)

    with w and p the softmaxes of the weak and of the final logits; the label of rank r is 1 / r, and the labels of
    the other classes are divided by their sum. That log p stands beside w is the authors' code, with which the
    published results were made.

    Args:
        logits_student, logits_weak: (N, C), C >= 2.
        target: (N,) class y of each sample.

    Returns:
        (N, C), rows that sum to 1, 0 at the target.
    """
    label = target[:, None]
    weak, final = F.softmax(upcast(logits_weak), 1), F.log_softmax(upcast(logits_student), 1)
    score = sum(part / (1 - part.gather(1, label) + 1e-6) for part in (weak, final))
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    zipf = rank.to(score.dtype).reciprocal().scatter(1, label, 0.0)
    return zipf / zipf.sum(1, keepdim=True)


def uskd_loss(
    logits_student: Tensor, logits_weak: Tensor, target: Tensor, alpha: float, beta: float, mu: float
) -> Tensor:
    """Cross-entropies with the student's own soft labels, and of a weak classifier.

    Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
    and Customized Soft Labels, ICCV 2023, arXiv:2303.13005.

        - mean over samples of ( alpha * (1 + p[y]^2 - mean over the batch of p[y]^2) * log p[y]
                               + beta  * sum over c != y of z[c] * log q[c]
                               + mu    * sum over c of l[c] * log w[c] )

    with p the softmax of the logits, q that over the classes other than y, z the :func:`zipf_labels`, w the softmax
    of the weak logits, l the one-hot label smoothed by 0.1. The factor before log p[y] and z have no gradient.

    Args:
        logits_student: (N, C), C >= 2.
        logits_weak: (N, C), of a classifier on an earlier feature; other shapes are a ValueError.
        target: (N,) class y of each sample.
        alpha, beta, mu: weights of the target, the other classes and the weak classifier.
    """
    if logits_weak.shape != logits_student.shape:
        raise ValueError(
            f"the weak logits are {tuple(logits_weak.shape)}, but the logits {tuple(logits_student.shape)}: "
            "each row of the logits needs a feature of its own"
        )
    student, weak, label = upcast(logits_student), upcast(logits_weak), target[:, None]
    log_p = F.log_softmax(student, dim=1).gather(1, label)[:, 0]
    square = log_p.detach().exp() ** 2
    target_part = (1 + square - safe_mean(square)) * log_p
    other_part = (zipf_labels(student, weak, target) * log_softmax_of_others(student, target)).sum(1)
    weak_part = -F.cross_entropy(weak, target, label_smoothing=0.1, reduction="none")
    return -safe_mean(alpha * target_part + beta * other_part + mu * weak_part)


@DISTILLERS.register()
class USKD(Distiller):
    """`uskd_loss`, with weak logits from a linear head on the second to last feature map, averaged over space.

    For classifiers only: a student without a pooled vector, whose logits are those of proposals or anchors, is refused.
    """

    # The pooled vector is not read: only where rows of the logits are images is there one.
    needs = ("logits", "feats", "pooled")
    needs_teacher = False
    takes_soft_target = False

    def build(self, student: NetworkInfo, teacher: NetworkInfo | None, data: TrainingData) -> None:
        if len(student.feats) < 2:
            raise ValueError(f"{self.name} needs the feature map before the last, but the student gives one map alone")
        self.head = nn.Linear(student.feats[-2][0], student.num_classes)

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            # Weight of the target.
            "ALPHA": 1.0,
            # Weight of the other classes' Zipf labels.
            "BETA": 0.1,
            # Weight of the weak classifier.
            "MU": 0.005,
        }

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        with no_autocast(student.logits):
            middle = upcast(student.feats[-2]).mean((2, 3))
            weak = self.head(middle.to(self.head.weight.dtype))
            return uskd_loss(student.logits, weak, batch.target, self.cfg.ALPHA, self.cfg.BETA, self.cfg.MU)
