"""Relational knowledge distillation."""

import torch
from torch import Tensor
from torch.nn import functional as F

from d2distill.common.distillers._numerics import no_autocast, safe_mean, upcast
from d2distill.common.distillers.base import DISTILLERS, Distiller
from d2distill.common.outputs import Batch, Outputs

__all__ = ["RKD", "rkd_loss"]


def rkd_loss(
    embedding_student: Tensor,
    embedding_teacher: Tensor,
    distance_weight: float = 25,
    angle_weight: float = 50,
    squared: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """Distance-wise and angle-wise potentials of the batch.

    Park, Kim, Lu, Cho: Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068.

        distance_weight * mean over pairs of smooth_L1(d_s, d_t)
        + angle_weight * mean over triplets of smooth_L1(a_s, a_t)

    with d_ij = ||e_i - e_j|| over the mean of the positive ones and a_ijk the cosine of the angle that samples j and k
    make at i. The means run over all N^2 pairs and N^3 triplets, equal indices included (both are 0 there); a batch
    of one gives 0.

    Args:
        embedding_student, embedding_teacher: (N, D); D may differ.
        distance_weight, angle_weight: weights of the two parts.
        squared: compare squared distances.
        eps: lower bound of a squared distance; two samples at the same place have no gradient.
    """

    def relations(embedding: Tensor) -> tuple[Tensor, Tensor]:
        embedding = upcast(embedding)
        # Differences and not |a|^2 + |b|^2 - 2ab, which cancels for neighbors far from the origin.
        differences = embedding.unsqueeze(0) - embedding.unsqueeze(1)
        norms = torch.linalg.vector_norm(differences, dim=2)
        distances = norms.square().clamp_min(eps) if squared else norms.clamp_min(eps**0.5)
        distances = distances * (1 - torch.eye(len(embedding), dtype=embedding.dtype, device=embedding.device))
        mean = distances.sum() / (distances > 0).sum().clamp_min(1)
        # Two samples at the same place have no direction: 0, without a gradient. A product, not a quotient, whose
        # backward pass goes through the N x N x D differences five times.
        directions = differences * torch.where(norms > 1e-12, norms, torch.inf).reciprocal()[:, :, None]
        return distances / mean.clamp_min(eps), directions @ directions.mT

    with no_autocast(embedding_student):
        pairs = zip(relations(embedding_student), relations(embedding_teacher.detach()), strict=True)
        distance, angle = (safe_mean(F.smooth_l1_loss(*pair, reduction="none")) for pair in pairs)
        return distance_weight * distance + angle_weight * angle


@DISTILLERS.register()
class RKD(Distiller):
    """`rkd_loss` on the pooled vectors."""

    needs = ("pooled",)

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WEIGHT": 1.0,
            # Weight of the distances between two samples.
            "DISTANCE_WEIGHT": 25.0,
            # Weight of the angles between three.
            "ANGLE_WEIGHT": 50.0,
            # Squared distances.
            "SQUARED": False,
            # Smallest squared distance.
            "EPS": 1e-12,
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        settings = self.cfg.DISTANCE_WEIGHT, self.cfg.ANGLE_WEIGHT, self.cfg.SQUARED, self.cfg.EPS
        return rkd_loss(student.pooled, teacher.pooled, *settings)
