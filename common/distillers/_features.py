"""What the methods on feature maps share: which maps are compared, and how maps of different size are."""

from collections.abc import Iterator, Sequence
from typing import Any

from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from d2distill.common.distillers._numerics import no_autocast, upcast
from d2distill.common.distillers.base import Distiller
from d2distill.common.outputs import Batch, NetworkInfo, Outputs, TrainingData

__all__ = ["FeatureDistiller"]


class FeatureDistiller(Distiller):
    """Base of the methods that compare lists of feature maps. A subclass states `feature_loss()`.

    The setting FIRST is the index of the first map that takes part. 1, the default, leaves out a classifier's stem:
    the "stages" of the literature. In detection it is 0: a pyramid's first map is as good as the rest.
    Networks with different numbers of stages are aligned from the deep end: the longer list loses its shallowest.

    Raises:
        ValueError: no map is left from FIRST on.
    """

    needs = ("feats",)
    #: The field of `Outputs` that is compared, of either network. A subclass may choose when it is built.
    student_maps = "feats"
    teacher_maps = "feats"

    def __init__(
        self, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData | None = None
    ) -> None:
        super().__init__(cfg, student, teacher, data)
        for side, info in (("student", student), ("teacher", teacher)):
            if len(info.feats) <= cfg.FIRST:
                raise ValueError(
                    f"{self.name}: FIRST is {cfg.FIRST}, which leaves none of the {side}'s {len(info.feats)} maps"
                )

    @classmethod
    def common_defaults(cls) -> dict[str, Any]:
        return {**super().common_defaults(), "FIRST": 1}

    def select_pairs(
        self, student: Outputs | NetworkInfo, teacher: Outputs | NetworkInfo
    ) -> tuple[list[Any], list[Any]]:
        """The maps (of outputs) or their shapes that are compared, in pairs from shallow to deep."""
        first = self.cfg.FIRST
        return align(getattr(student, self.student_maps)[first:], getattr(teacher, self.teacher_maps)[first:])

    def feature_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        """The method's term: a 0-d tensor from two lists, of the same length, of maps (N, C, H, W)."""
        raise TypeError(f"{self.name} defines no feature_loss()")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        feats_student, feats_teacher = self.select_pairs(student, teacher)
        # Half precision has no room for squares and sums over whole maps, nor for the gradients of connectors.
        with no_autocast(feats_student[0]):
            return self.feature_loss(*([upcast(f) for f in maps] for maps in (feats_student, feats_teacher)))


class BatchNorm(nn.BatchNorm2d):
    """Batch norm for connectors. With fewer than two values per channel, as the last batch of an epoch may leave
    for a pooled vector, there is no variance to take: the running statistics serve."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() < 2 * x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


def align(*lists: Sequence[Any]) -> tuple[list[Any], ...]:
    """The lists cut to the length of the shortest; their last entries, the deepest, stay together."""
    length = min(map(len, lists))
    return tuple(list(entries[len(entries) - length :]) for entries in lists)


def pool_to_smaller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The larger of two maps (N, C, H, W) average-pooled to the smaller, along each axis."""
    size = [min(sizes) for sizes in zip(a.shape[2:], b.shape[2:], strict=True)]
    return resize_to(a, size), resize_to(b, size)


def pool_pairs_to_smaller(
    feats_student: Sequence[Tensor], feats_teacher: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of maps of one size, see :func:`pool_to_smaller`, in at least fp32, the teacher's detached.

    Raises:
        ValueError: lists of different length.
    """
    for student, teacher in zip(feats_student, feats_teacher, strict=True):
        yield pool_to_smaller(upcast(student), upcast(teacher).detach())


def resize_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (N, C, H, W) of another size: average-pooled along an axis that shrinks, bilinear along one that grows."""
    size = tuple(size)
    pooled = tuple(min(sizes) for sizes in zip(x.shape[2:], size, strict=True))
    if pooled != x.shape[2:]:
        x = F.adaptive_avg_pool2d(x, pooled)
    return x if size == pooled else F.interpolate(x, size, mode="bilinear", align_corners=False)
