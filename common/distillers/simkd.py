"""The teacher's classifier at the end of the student."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2distill.common.distillers._features import BatchNorm, resize_to, shrink_to
from d2distill.common.distillers._numerics import mse, no_autocast, upcast
from d2distill.common.distillers.base import DISTILLERS, Distiller
from d2distill.common.modules import shared_copy
from d2distill.common.outputs import Batch, NetworkInfo, Outputs, TrainingData

__all__ = ["SimKD", "simkd_loss"]


def simkd_loss(feat_student: Tensor, feat_teacher: Tensor) -> Tensor:
    """Mean squared error of the student's projected last map to the teacher's.

    Chen et al.: Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022, arXiv:2203.14001.

    Args:
        feat_student, feat_teacher: (N, C, H, W), the student's after its projector. A larger teacher's map is
            average-pooled to the student's size.
    """
    return mse(feat_student, resize_to(upcast(feat_teacher), feat_student.shape[2:]))


class Projector(nn.Sequential):
    """From the student's last map to the shape of the teacher's: 1x1, 3x3 and 1x1 convolutions, batch norms, ReLUs.

    Args:
        channels_student, channels_teacher: of the two maps.
        factor: the convolutions in between have `channels_teacher` / `factor` channels.
    """

    def __init__(self, channels_student: int, channels_teacher: int, factor: int) -> None:
        middle = max(channels_teacher // factor, 1)
        sizes = [(channels_student, middle, 1), (middle, middle, 3), (middle, channels_teacher, 1)]
        layers: list[nn.Module] = []
        for channels_in, channels_out, kernel in sizes:
            conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)
            layers += [conv, BatchNorm(channels_out), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class SimKDStudent(nn.Module):
    """What is deployed: the student without its classifier, the projector, the teacher's classifier.

    It takes normalized images (N, 3, H, W) and gives logits (N, C).
    """

    def __init__(self, student: nn.Module, method: "SimKD") -> None:
        super().__init__()
        layers = set() if method.student_classifier[0] is None else set(method.student_classifier[0].modules())
        own = [name for name, module in student.named_modules() if module in layers]
        self.body = shared_copy(student, {own[0]: nn.Identity()} if own else {})
        self.projector, self.classifier, self._size = method.projector, method.classifier, method.size

    def outputs(self, images: Tensor) -> Outputs:
        feats = self.body.outputs(images).feats
        projected = self.projector(shrink_to(feats[-1], self._size))
        pooled = projected.mean((2, 3))
        return Outputs(self.classifier(pooled), [*feats, projected], None, pooled)

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs(images).logits


@DISTILLERS.register()
class SimKD(Distiller):
    """`simkd_loss` of the student's last feature map, through a projector, to the map that the teacher pools.

    The student is deployed with the projector and the teacher's frozen classifier in the place of its own. The paper
    trains on this term alone: set CE_WEIGHT to 0.

    Raises:
        ValueError: the teacher has no classifier, other classes, or a classifier that does not take the average of its
            last map (found in the first step).
    """

    needs = ("feats",)

    def build(self, student: NetworkInfo, teacher: NetworkInfo, data: TrainingData) -> None:
        channels, *size = teacher.feats[-1]
        if teacher.classifier is None or teacher.pooled != channels:
            raise ValueError(
                f"{self.name} ends the student with the teacher's classifier, which must take the average of its last "
                f"map: this teacher's map has {channels} channels, its classifier takes {teacher.pooled}"
            )
        if teacher.num_classes != student.num_classes:
            raise ValueError(
                f"{self.name} reuses the teacher's classifier, but it has {teacher.num_classes} classes and the "
                f"student {student.num_classes}"
            )
        # The map before the pool: a WRN's stages end before a batch norm and a ReLU that its pooled vector has.
        self.teacher_part = "feats" if teacher.preacts is None else "preacts"
        self.teacher_needs = {self.teacher_part, "pooled"}
        self.size = tuple(size)
        self.projector = Projector(student.feats[-1][0], channels, self.cfg.FACTOR)
        # A copy: it belongs to the student, and is in its checkpoints.
        self.classifier = copy.deepcopy(teacher.classifier).requires_grad_(False)
        # In a list, so that it is no submodule of the method.
        self.student_classifier = [student.classifier]
        self.checked = False

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {
            # The projector's inner channels are the teacher's divided by it.
            "FACTOR": 2,
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        feat_teacher = getattr(teacher, self.teacher_part)[-1]
        feat_teacher = F.relu(feat_teacher) if self.teacher_part == "preacts" else feat_teacher
        self._check_pool(feat_teacher, teacher.pooled)
        return simkd_loss(self._project(student), feat_teacher)

    def predict(self, student: Outputs) -> Tensor:
        return self.classifier(self._project(student).mean((2, 3)))

    def deployed(self, student: nn.Module) -> nn.Module:
        return SimKDStudent(student, self)

    def _project(self, student: Outputs) -> Tensor:
        with no_autocast(student.feats[-1]):
            return self.projector(shrink_to(upcast(student.feats[-1]), self.size))

    def _check_pool(self, feat: Tensor, pooled: Tensor) -> None:
        if not self.checked and not torch.allclose(upcast(feat).mean((2, 3)), upcast(pooled), rtol=1e-2, atol=1e-2):
            raise ValueError(f"{self.name}: the teacher's classifier does not take the average of its last map")
        self.checked = True
