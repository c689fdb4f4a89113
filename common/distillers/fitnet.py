"""Hints from an intermediate layer."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from d2distill.common.distillers._features import BatchNorm, resize_to
from d2distill.common.distillers._numerics import mse, no_autocast, upcast
from d2distill.common.distillers.base import DISTILLERS, Distiller
from d2distill.common.outputs import Batch, NetworkInfo, Outputs, TrainingData

__all__ = ["FitNet", "fitnet_loss"]


def fitnet_loss(feat_student: Tensor, feat_teacher: Tensor) -> Tensor:
    """Mean squared error of the regressed student map to the teacher's.

    Romero et al.: FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv:1412.6550.

    Args:
        feat_student, feat_teacher: (N, C, H, W), the student's after its regressor.
    """
    return mse(feat_student, feat_teacher)


class Regressor(nn.Module):
    """Convolution, batch norm and ReLU from a student's map to the shape of a teacher's.

    The convolution is 3x3 with stride 2 if the student's map is twice as large as the teacher's, a transposed 4x4 with
    stride 2 if it is half as large, a valid one of size 1 + s - t if it is not smaller otherwise. Where it is smaller
    or the sizes are unknown, it is 1x1, and its result is resized to the teacher's map.

    Args:
        student_shape, teacher_shape: (C, H, W), or (C,) where the size is unknown.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        super().__init__()
        channels = student_shape[0], teacher_shape[0]
        sizes = list(zip(student_shape[1:], teacher_shape[1:], strict=False))
        if sizes and all(s == 2 * t for s, t in sizes):
            self.conv = nn.Conv2d(*channels, 3, stride=2, padding=1)
        elif sizes and all(2 * s == t for s, t in sizes):
            self.conv = nn.ConvTranspose2d(*channels, 4, stride=2, padding=1)
        elif sizes and all(s >= t for s, t in sizes):
            self.conv = nn.Conv2d(*channels, tuple(1 + s - t for s, t in sizes))
        else:
            self.conv = nn.Conv2d(*channels, 1)
        self.bn = BatchNorm(teacher_shape[0])

    def forward(self, feat: Tensor, size: Sequence[int]) -> Tensor:
        """(N, C_s, H_s, W_s) to (N, C_t, *size)."""
        return F.relu(self.bn(resize_to(self.conv(feat), size)))


@DISTILLERS.register()
class FitNet(Distiller):
    """`fitnet_loss` at ``feats[HINT_LAYER]``, a map that both networks have, through a learned regressor."""

    needs = ("feats",)

    def build(self, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData) -> None:
        layer = self.cfg.HINT_LAYER
        for side, info in (("student", student), ("teacher", teacher)):
            if not -len(info.feats) <= layer < len(info.feats):
                raise ValueError(f"{self.name}: HINT_LAYER is {layer}, but the {side} has {len(info.feats)} maps")
        self.regressor = Regressor(student.feats[layer], teacher.feats[layer])

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            "WEIGHT": 100.0,
            # Number of the map that is compared; 0 is the stem.
            "HINT_LAYER": 2,
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        feat_student, feat_teacher = (of.feats[self.cfg.HINT_LAYER] for of in (student, teacher))
        # In half precision large maps have gradients of the regressor that are not finite.
        with no_autocast(feat_student):
            regressed = self.regressor(upcast(feat_student), feat_teacher.shape[2:])
            return fitnet_loss(regressed, feat_teacher)
