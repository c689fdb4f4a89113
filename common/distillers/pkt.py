"""Probabilistic knowledge transfer."""

import torch
from torch import Tensor

from d2distill.common.distillers._numerics import no_autocast, safe_mean, upcast
from d2distill.common.distillers.base import DISTILLERS, Distiller
from d2distill.common.outputs import Batch, Outputs

__all__ = ["PKT", "pkt_loss"]


def pkt_loss(embedding_student: Tensor, embedding_teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """Divergence of the conditional probabilities of samples within the batch.

    Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018, arXiv:1803.10837.

        mean over the N x N matrix of q * log((q + eps) / (p + eps))

    with p of the student and q of the teacher: (cosine + 1) / 2 of all pairs of samples, rows normalized to sum 1. A
    batch of one gives 0.

    Args:
        embedding_student, embedding_teacher: (N, D); D may differ.
        eps: added to norms and probabilities.
    """

    def probabilities(embedding: Tensor) -> Tensor:
        embedding = upcast(embedding)
        unit = embedding / (torch.linalg.vector_norm(embedding, dim=1, keepdim=True) + eps)
        similarity = (unit @ unit.T + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)

    with no_autocast(embedding_student):
        p, q = probabilities(embedding_student), probabilities(embedding_teacher.detach())
        return safe_mean(q * ((q + eps) / (p + eps)).log())


@DISTILLERS.register()
class PKT(Distiller):
    """`pkt_loss` on the pooled vectors."""

    needs = ("pooled",)

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WEIGHT": 30000.0,
            # Added to norms and in logarithms.
            "EPS": 1e-7,
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return pkt_loss(student.pooled, teacher.pooled, self.cfg.EPS)
