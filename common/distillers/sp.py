"""Similarity-preserving distillation."""

from torch import Tensor

from d2distill.common.distillers._numerics import l2_normalize, no_autocast, safe_mean, upcast
from d2distill.common.distillers.base import DISTILLERS, Distiller
from d2distill.common.outputs import Batch, Outputs

__all__ = ["SP", "sp_loss"]


def sp_loss(feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
    """Distance of the batch's similarity matrices.

    Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv:1907.09682.

        sum over maps of ||G_s - G_t||_F^2 / N^2,  G = F F^T with L2-normalized rows,  F (N, C*H*W) the flattened map

    G is N x N whatever the map, so channels and sizes may differ. A batch of one, without another sample to be similar
    to, gives 0.

    Args:
        feats_student, feats_teacher: lists of the same length of (N, C, H, W).
    """

    def similarities(feats: Tensor) -> Tensor:
        flat = upcast(feats).flatten(1)
        return l2_normalize(flat @ flat.T, dim=1)

    with no_autocast(feats_student[0]):
        return sum(
            safe_mean((similarities(s) - similarities(t.detach())).square())
            for s, t in zip(feats_student, feats_teacher, strict=True)
        )


@DISTILLERS.register()
class SP(Distiller):
    """`sp_loss` on the deepest feature map."""

    needs = ("feats",)

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {"WEIGHT": 3000.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return sp_loss(student.feats[-1:], teacher.feats[-1:])
