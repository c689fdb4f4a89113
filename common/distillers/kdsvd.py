"""Distillation of the feature maps' singular vectors."""

import torch
from torch import Tensor
from torch.nn import functional as F

from d2distill.common.distillers._features import FeatureDistiller, pool_pairs_to_smaller
from d2distill.common.distillers._numerics import no_autocast
from d2distill.common.distillers.base import DISTILLERS
from d2distill.common.outputs import NetworkInfo, TrainingData

__all__ = ["KDSVD", "kdsvd_loss"]


def kdsvd_loss(feats_student: list[Tensor], feats_teacher: list[Tensor], k: int = 1) -> Tensor:
    """Distance of the relations between the leading right singular vectors of consecutive maps.

    Lee, Kim, Song: Self-supervised Knowledge Distillation Using Singular Value Decomposition, ECCV 2018,
    arXiv:1807.06819.

    Each map, as N matrices (C*H, W), gives right singular vectors: k of the teacher, k + 3 of the student, of which
    each of the teacher's takes the one with the largest absolute cosine, with its sign. Both are scaled by the
    teacher's singular values (L2-normalized). With V the result of a map and V' that of the map before it:

        sum over consecutive maps of sum (R_s - R_t)^2 / N,  R_nijc = exp(-(V_nic - V'_njc)^2 / 8)

    The larger map of a pair is average-pooled to the smaller; the channels may differ. A map narrower than k gives
    as many vectors as it has, and entries that are not finite count 0, in the loss and in its gradient.

    Args:
        feats_student, feats_teacher: lists of the same length >= 2 of (N, C, H, W).
        k: number of singular vectors.
    """
    if len(feats_student) < 2:
        raise ValueError(f"consecutive maps are compared, which takes two or more, but there are {len(feats_student)}")
    total, before = 0.0, None
    with no_autocast(feats_student[0]):
        for student, teacher in pool_pairs_to_smaller(feats_student, feats_teacher):
            values, vectors_teacher = _right_singular(teacher, k)
            _, vectors_student = _right_singular(student, k + 3)
            weights = F.normalize(values, dim=1).unsqueeze(1)
            now = _aligned(vectors_student, vectors_teacher) * weights, vectors_teacher * weights
            if before is not None:
                error = (_relations(now[0], before[0]) - _relations(now[1], before[1])).square()
                total = total + torch.where(error.isfinite(), error, 0.0).sum()
            before = now
    return total / max(feats_student[0].shape[0], 1)


def _right_singular(feats: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Leading singular values (N, k) and right vectors (N, W, k) of a map (N, C, H, W)."""
    matrices = feats.flatten(1, 2)
    if matrices.requires_grad:
        # Equal singular values have no vectors of their own, so no gradient: 1 / 0 in that of the decomposition.
        matrices.register_hook(lambda grad: torch.where(grad.isfinite(), grad, 0.0))
    _, values, vectors = torch.linalg.svd(matrices, full_matrices=False)
    return values[:, :k], vectors[:, :k].mT


def _aligned(student: Tensor, teacher: Tensor) -> Tensor:
    """Student vectors (N, W, K) in the order, number and signs of the teacher's (N, W, k)."""
    cosine = (student.mT @ teacher).detach()
    size = cosine.abs()
    return student @ torch.where(size == size.amax(1, keepdim=True), cosine.sign(), 0.0)


def _relations(now: Tensor, before: Tensor) -> Tensor:
    """(N, W, W', k) radial basis functions of all pairs of entries of (N, W, k) and (N, W', k)."""
    k = min(now.shape[2], before.shape[2])
    return torch.exp(-(now[:, :, None, :k] - before[:, None, :, :k]).square() / 8)


@DISTILLERS.register()
class KDSVD(FeatureDistiller):
    """`kdsvd_loss` on the stages, of which each network needs two or more."""

    def build(self, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData) -> None:
        super().build(student, teacher, data)
        if len(self.select_pairs(student, teacher)[0]) < 2:
            raise ValueError(f"{self.name} relates consecutive maps, which takes two or more of each network")

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WEIGHT": 1.0,
            # Singular vectors that are kept of the teacher; of the student 3 more.
            "K": 1,
        }

    def feature_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        return kdsvd_loss(feats_student, feats_teacher, self.cfg.K)
