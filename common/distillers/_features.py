"""What the methods on feature maps share: which maps are compared, and how maps of different size are."""

from collections.abc import Iterator, Sequence

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

    def build(self, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData) -> None:
        for side, info in (("student", student), ("teacher", teacher)):
            if len(info.feats) <= self.cfg.FIRST:
                raise ValueError(
                    f"{self.name}: FIRST is {self.cfg.FIRST}, which leaves none of the {side}'s {len(info.feats)} maps"
                )

    @classmethod
    def common_defaults(cls) -> dict[str, object]:
        return {
            **super().common_defaults(),
            # Number of the first map that is compared. 1 leaves out a classifier's stem; in detection 0 is p2 or p3.
            "FIRST": 1,
        }

    def select_pairs(self, student: Outputs | NetworkInfo, teacher: Outputs | NetworkInfo) -> tuple[list, list]:
        """The maps (of outputs) or their shapes that are compared, in pairs from shallow to deep."""
        first, last = self.cfg.FIRST, self.cfg.get("LEVELS") or None
        maps = getattr(student, self.student_maps), getattr(teacher, self.teacher_maps)
        return align(*(of[first:][:last] for of in maps))

    def feature_loss(self, feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
        """The method's term: a 0-d tensor from two lists, of the same length, of maps (N, C, H, W)."""
        raise TypeError(f"{self.name} defines no feature_loss()")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        feats_student, feats_teacher = self.select_pairs(student, teacher)
        # Half precision has no room for squares and sums over whole maps, nor for the gradients of connectors.
        with no_autocast(feats_student[0]):
            return self.feature_loss(*([upcast(f) for f in maps] for maps in (feats_student, feats_teacher)))


class LevelDistiller(FeatureDistiller):
    """Base of the methods that compare maps of equal channels. A subclass states `defaults()` and `feature_loss()`.

    Compared are LEVELS maps (0: all) from number FIRST on; FIRST -1 takes the last one. Student maps of other channels
    go through a learned 1x1 convolution, :meth:`connected`.
    """

    def build(self, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData) -> None:
        super().build(student, teacher, data)
        channels = [(s[0], t[0]) for s, t in zip(*self.select_pairs(student, teacher), strict=True)]
        self.connectors = nn.ModuleList(nn.Identity() if s == t else nn.Conv2d(s, t, 1) for s, t in channels)

    @classmethod
    def common_defaults(cls) -> dict[str, object]:
        return {
            **super().common_defaults(),
            # How many maps are compared, from FIRST on. 0: all.
            "LEVELS": 0,
        }

    def connected(self, feats_student: list[Tensor]) -> list[Tensor]:
        """The student's maps with the teacher's channels."""
        return [connector(feat) for connector, feat in zip(self.connectors, feats_student, strict=True)]


class BatchNorm(nn.BatchNorm2d):
    """Batch norm for connectors. With fewer than two values per channel, as the last batch of an epoch may leave
    for a pooled vector, there is no variance to take: the running statistics serve."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() < 2 * x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


def align(*lists: Sequence) -> tuple[list, ...]:
    """The lists cut to the length of the shortest; their last entries, the deepest, stay together."""
    length = min(map(len, lists))
    return tuple(list(entries[len(entries) - length :]) for entries in lists)


def shrink_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (N, C, H, W) average-pooled to `size` along each axis where it is larger."""
    size = tuple(map(min, x.shape[2:], size))
    return x if size == x.shape[2:] else F.adaptive_avg_pool2d(x, size)


def resize_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (N, C, H, W) of another size: average-pooled along an axis that shrinks, bilinear along one that grows."""
    x, size = shrink_to(x, size), tuple(size)
    return x if size == x.shape[2:] else F.interpolate(x, size, mode="bilinear", align_corners=False)


def pool_pairs_to_smaller(
    feats_student: Sequence[Tensor], feats_teacher: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of maps, in at least fp32, the larger average-pooled to the smaller; the teacher's detached."""
    for student, teacher in zip(feats_student, feats_teacher, strict=True):
        student, teacher = upcast(student), upcast(teacher).detach()
        yield shrink_to(student, teacher.shape[2:]), shrink_to(teacher, student.shape[2:])


def resize_pairs_to_teacher(
    feats_student: Sequence[Tensor], feats_teacher: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The deepest pairs of maps, in at least fp32, the student's interpolated to the teacher's size; the teacher's
    detached.

    Raises:
        ValueError: maps of different channels, or none.
    """
    if not (feats_student and feats_teacher):
        raise ValueError("there are no feature maps to compare")
    for student, teacher in zip(*align(feats_student, feats_teacher), strict=True):
        if student.shape[:2] != teacher.shape[:2]:
            raise ValueError(
                f"maps of {tuple(student.shape)} and {tuple(teacher.shape)} have different samples or channels"
            )
        student, teacher = upcast(student), upcast(teacher).detach()
        if student.shape != teacher.shape:
            student = F.interpolate(student, teacher.shape[2:], mode="bilinear", align_corners=False)
        yield student, teacher
