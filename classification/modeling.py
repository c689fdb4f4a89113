"""The student with a teacher, or several, at its side: what the trainer calls."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2distill.classification.config import image_size, teacher_nodes
from d2distill.classification.data import dataset_info
from d2distill.classification.networks import Normalize, build_network, infer_output_spec
from d2distill.common.config import CfgNode, chosen_methods, resolve_device
from d2distill.common.distillers import Context
from d2distill.common.engine.teacher import exclude_teacher_from_state_dict, passes, teaching
from d2distill.common.errors import ConfigError
from d2distill.common.outputs import Outputs

__all__ = ["DistillModel", "build_distiller"]


class DistillModel(nn.Module):
    """Turns a batch into losses in training mode and into the student's logits in eval mode.

    Teachers are always in eval mode, never in a gradient and never in the state dict.

    Args:
        student: a network with ``outputs()``.
        teachers: networks with ``outputs()``; none for plain training and for methods that need none.
        distillers: methods by lower-case name.
        student_norm, teacher_norms: each network's normalisation.
        shares: of each teacher in what several of them teach together; their sum is 1.
        ce_weight: weight of the cross-entropy.

    Attributes:
        student, distillers: as given.
        teacher: the one teacher, a ModuleList of several, or None.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        distillers: dict[str, nn.Module],
        student_norm: Normalize,
        teacher_norms: Sequence[Normalize],
        shares: Sequence[float],
        ce_weight: float,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = None
        if teachers:
            self.teacher = nn.ModuleList(teachers) if len(teachers) > 1 else teachers[0]
            self.teacher.requires_grad_(False).eval()
        self.distillers = nn.ModuleDict(distillers)
        self.student_norm = student_norm
        self.teacher_norms = nn.ModuleList(teacher_norms)
        self.shares = list(shares)
        self.ce_weight = ce_weight
        exclude_teacher_from_state_dict(self)

    def train(self, mode: bool = True) -> "DistillModel":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def set_labels(self, labels: Tensor) -> None:
        """Tell the methods the class of every training sample: (num_samples,), in the order of ``index``.

        Raises:
            ConfigError: a method has no use for them.
        """
        for distiller in self.distillers.values():
            try:
                distiller.set_labels(labels)
            except ValueError as error:
                raise ConfigError(f"DISTILL.METHODS: {error}") from error

    def forward(self, batch: Mapping[str, Tensor], epoch: float = 1) -> dict[str, Tensor] | Tensor:
        """Losses of a batch, or its logits.

        Args:
            batch: ``image`` (N, 3, H, W), uint8 or float in 0..255, not normalised; in training mode also
                ``label`` (N,) and, where a method asks for them, ``index`` (N,) and ``contrast_index`` (N, 1 + K).
            epoch: counted from 1; warm-ups depend on it.

        Returns:
            In training mode ``loss_ce`` and one ``loss_<method>`` each, 0-d, weighted; else logits (N, C).
        """
        images = self.student_norm(batch["image"])
        if not self.training:
            return self.student(images)
        target, index, contrast_index = (
            None if part is None else part.to(images.device, non_blocking=True)
            for part in (batch["label"], batch.get("index"), batch.get("contrast_index"))
        )
        student = self.student.outputs(images)
        # The sum over an empty batch is 0; its mean would be NaN.
        cross_entropy = F.cross_entropy(student.logits.float(), target, reduction="sum") / max(len(target), 1)
        losses = {"loss_ce": self.ce_weight * cross_entropy}
        methods = self.distillers.values()
        teachers = {by_batch: self._teach(batch["image"], by_batch) for by_batch in passes(methods)}
        ctx = Context(epoch, index, contrast_index)
        for distiller in methods:
            teacher = None
            if distiller.needs_teacher:
                teacher = teachers[distiller.teacher_batch_statistics][distiller.cfg.get("TEACHER", 0)]
            losses.update(distiller(student, teacher, target, ctx))
        return losses

    @torch.no_grad()
    def _teach(self, images: Tensor, by_batch: bool) -> list[Outputs]:
        networks = self.teacher if isinstance(self.teacher, nn.ModuleList) else [self.teacher]
        teachers = []
        for network, norm in zip(networks, self.teacher_norms, strict=True):
            with teaching(network, by_batch):
                teachers.append(network.outputs(norm(images)))
        if len(teachers) > 1:
            ensemble = [(share, teacher.logits) for share, teacher in zip(self.shares, teachers, strict=True)]
            teachers = [replace(teacher, ensemble=ensemble) for teacher in teachers]
        return teachers


def build_distiller(
    cfg: CfgNode,
    student: nn.Module | None = None,
    teacher: nn.Module | Sequence[nn.Module] | None = None,
    num_samples: int | None = None,
) -> DistillModel:
    """Student, teachers and the methods of ``cfg.DISTILL.METHODS``, on the device of ``cfg.MODEL.DEVICE``.

    Args:
        cfg: from :func:`d2distill.classification.config.get_cfg`.
        student, teacher: networks to take instead of those that `cfg` names.
        num_samples: size of the training set, for methods that remember samples.

    Raises:
        ConfigError: a network, method or class count that does not fit.
        CheckpointError: weights that are missing or of another network.
    """
    info = dataset_info(cfg.DATASETS.NAME)
    num_classes = cfg.MODEL.NUM_CLASSES or info.num_classes
    if num_classes is None:
        raise ConfigError(f"MODEL.NUM_CLASSES: data set {info.name} has no fixed number of classes; set it")
    methods = chosen_methods(cfg)
    student = student or build_network(cfg, "MODEL.STUDENT", cfg.MODEL.STUDENT, num_classes)
    teachers, shares, norms = [], [], []
    if any(method.needs_teacher for method in methods.values()):
        given = [] if teacher is None else list(teacher) if isinstance(teacher, Sequence | nn.ModuleList) else [teacher]
        nodes = teacher_nodes(cfg, len(given))
        if not nodes:
            raise ConfigError(f"DISTILL.METHODS {list(methods)} need a teacher, but MODEL.TEACHER.NAME is empty")
        teachers = given or [build_network(cfg, "MODEL.TEACHER", node, num_classes) for node in nodes]
        shares = [node.SHARE for node in nodes]
        norms = [Normalize.of(node, info) for node in nodes]
    distillers = {}
    if methods:
        size = image_size(cfg)
        student_spec, *teacher_specs = (infer_output_spec(network, size) for network in (student, *teachers))
    for name, method in methods.items():
        node = cfg.DISTILL[name.upper()]
        number = node.get("TEACHER", 0)
        if method.needs_teacher and not 0 <= number < len(teachers):
            raise ConfigError(f"DISTILL.{name.upper()}.TEACHER is {number}, but there are {len(teachers)} teachers")
        teacher_spec = teacher_specs[number] if method.needs_teacher else None
        try:
            distillers[name.lower()] = method(node, student_spec, teacher_spec, num_samples)
        except ValueError as error:
            raise ConfigError(f"DISTILL.METHODS: {error}") from error
    student_norm = Normalize.of(cfg.MODEL.STUDENT, info)
    model = DistillModel(student, teachers, distillers, student_norm, norms, shares, cfg.DISTILL.CE_WEIGHT)
    return model.to(resolve_device(cfg))
