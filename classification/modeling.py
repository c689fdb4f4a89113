"""The student with its teachers and methods: what the trainer calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2distill.classification.config import image_size, teacher_nodes
from d2distill.classification.data import dataset_info
from d2distill.classification.inputs import resolve_inputs
from d2distill.classification.networks import Normalize, build_network, network_info
from d2distill.common.config import CfgNode, chosen_methods, resolve_device
from d2distill.common.distillers import DISTILLERS, Distiller
from d2distill.common.errors import ConfigError
from d2distill.common.modules import captured_extras
from d2distill.common.outputs import Batch, NetworkInfo, Outputs, Progress, TrainingData
from d2distill.common.teachers import LiveTeacher, TeacherEnsemble, TeacherSource, exclude_teacher_from_state_dict

__all__ = ["DistillModel", "StepInputs", "build_distiller"]


@dataclass
class StepInputs:
    """All that the losses of a batch depend on, but for the networks and methods themselves.

    Attributes:
        images: (N, 3, H, W), uint8 or float in 0..255, not normalized.
        batch: what methods may know of it.
        teacher: the teachers' outputs; None without teachers.
        weights: one of each method, numbers or (methods,).
    """

    images: Tensor
    batch: Batch
    teacher: Outputs | None
    weights: Sequence[float] | Tensor


class DistillModel(nn.Module):
    """Turns a batch into losses in training mode and into the deployed student's logits in eval mode.

    Teachers are always in eval mode, never in a gradient and never in the state dict.

    Attributes:
        student: a network with ``outputs()``.
        teacher: the one teacher, a ModuleList of several, or None for plain training and methods that need none.
        teacher_source: gives the teachers' outputs.
        distillers: methods by lower-case name.
        student_needs: the parts of the student's outputs that the methods read.
        compiled_student: runs in the place of ``student.outputs`` in training mode; None: that.
        student_norm, teacher_norms: each network's normalization.
        ce_weight: weight of the cross-entropy.
        class_weights: (C,), or None: of each class in the cross-entropy, of its positives where images have several.
        multi_label: images have several classes: the cross-entropy is that of a sigmoid per class.
        step_metrics: ``train_top1``, the percentage of the last training step's images whose class has the highest of
            the student's logits, 0-d; nothing where images have several classes.
        finite: whether the outputs of ``student`` and ``teacher`` in the last training step were finite, 0-d.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        source: TeacherSource | None,
        distillers: dict[str, Distiller],
        student_norm: Normalize,
        teacher_norms: Sequence[Normalize],
        ce_weight: float,
        class_weights: Tensor | None = None,
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        self.student, self.student_norm = student, student_norm
        self.teacher = (nn.ModuleList(teachers) if len(teachers) > 1 else teachers[0]) if teachers else None
        self.distillers = nn.ModuleDict(distillers)
        self.teacher_norms = nn.ModuleList(teacher_norms)
        self.teacher_source, self.ce_weight, self.multi_label = source, ce_weight, multi_label
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.finite: dict[str, Tensor | None] = {}
        self.step_metrics: dict[str, Tensor] = {}
        self.compiled_student: Callable[[Tensor], Outputs] | None = None
        self.student_needs = {need for method in distillers.values() for need in method.student_needs}
        exclude_teacher_from_state_dict(self)

    def train(self, mode: bool = True) -> "DistillModel":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def deployed_student(self) -> nn.Module:
        """The network that is evaluated, saved and exported; it takes normalized images."""
        network = self.student
        for method in self.distillers.values():
            network = method.deployed(network)
        return network

    def forward(self, batch: Mapping[str, Tensor] | StepInputs, epoch: float = 1) -> dict[str, Tensor] | Tensor:
        """Losses of a batch, or its logits.

        Args:
            batch: ``image`` (N, 3, H, W), uint8 or float in 0..255, not normalized; in training mode also
                ``label`` (N,), multi-label (N, C), and, where known, ``soft_target`` (N, C) in its place, ``index``
                (N,), ``progress`` (a :class:`.Progress`), and whatever else a method may use; or what
                :meth:`step_inputs` made of it.
            epoch: counted from 1, where the batch has no ``progress``; warm-ups depend on it.

        Returns:
            In training mode ``loss_ce`` and one ``loss_<method>`` each, 0-d, weighted; else logits (N, C).
        """
        if not self.training:
            return self.deployed_student()(self.student_norm(batch["image"]))
        # The teacher first: the student's graph would hold memory that the teacher's layers use one after the other,
        # and allocated anew for each of them it costs a tenth of the step on a CPU.
        given = batch if isinstance(batch, StepInputs) else self.step_inputs(batch, epoch)
        images, step, teacher = self.student_norm(given.images), given.batch, given.teacher
        with captured_extras(self.student, self.student_needs) as captured:
            student = (self.compiled_student or self.student.outputs)(images).select({"logits", *self.student_needs})
        student.extras.update(captured)
        losses = {"loss_ce": self.ce_weight * self._cross_entropy(student.logits.float(), step)}
        self.finite = {"student": student.is_finite()} | ({} if teacher is None else {"teacher": teacher.is_finite()})
        self.step_metrics = {} if step.target is None else {"train_top1": _top1(student.logits, step.target)}
        for weight, (name, method) in zip(given.weights, self.distillers.items(), strict=True):
            losses[f"loss_{name}"] = weight * method(student, method.pick_teacher(teacher), step)
        return losses

    def step_inputs(self, batch: Mapping[str, Tensor], epoch: float = 1) -> StepInputs:
        """What :meth:`forward` computes the losses of a batch from: the teachers' outputs are part of it."""
        images = batch["image"].to(self.student_norm.mean.device, non_blocking=True)
        step = _batch_info({name: part for name, part in batch.items() if name != "image"}, epoch, images.device)
        if self.multi_label:
            step = replace(step, target=None, soft_target=step.target)
        teacher = None if self.teacher_source is None else self.teacher_source(images, step)
        return StepInputs(images, step, teacher, [m.weight(step.progress) for m in self.distillers.values()])

    def graph_inputs(self, batch: Mapping[str, Tensor]) -> StepInputs:
        """The same for a CUDA graph: weights as a tensor, and nothing to look up on the host."""
        given = self.step_inputs(batch)
        weights = torch.tensor(given.weights, pin_memory=given.images.is_cuda)
        return replace(given, batch=replace(given.batch, key=None, host_index=None), weights=weights)

    def _cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean over the images, and over the classes where each is a problem of its own.

        Not divided by the weights of the images, as torch does: with parts of a batch, in several processes or one by
        one, the step would be another than with the whole.
        """
        target, weights = batch.target if batch.soft_target is None else batch.soft_target, self.class_weights
        # The sum over an empty batch is 0; its mean would be NaN.
        if self.multi_label:
            total = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weights, reduction="sum")
            return total / max(target.numel(), 1)
        return F.cross_entropy(logits, target, weights, reduction="sum") / max(len(target), 1)


def _top1(logits: Tensor, target: Tensor) -> Tensor:
    return 100 * (logits.detach().argmax(1) == target).sum() / max(len(target), 1)


def _batch_info(batch: Mapping[str, Any], epoch: float, device: torch.device) -> Batch:
    """What methods may know of a loader's batch, on the device of the images."""
    given = {"progress": Progress(epoch=epoch)}
    for name, part in batch.items():
        moves = isinstance(part, Tensor) and name != "key"
        given[name] = part.to(device, non_blocking=True) if moves else part
    fields = {name: given.pop(name) for name in ("soft_target", "index", "key", "progress", "view") if name in given}
    return Batch(target=given.pop("label"), host_index=batch.get("index"), extras=given, **fields)


def build_distiller(
    cfg: CfgNode,
    student: nn.Module | None = None,
    teacher: nn.Module | Sequence[nn.Module] | None = None,
    num_samples: int | None = None,
    labels: Tensor | None = None,
) -> DistillModel:
    """Student, teachers and the methods of ``cfg.DISTILL.METHODS``, on the device of ``cfg.MODEL.DEVICE``.

    Args:
        student, teacher: networks to take instead of those that `cfg` names.
        num_samples: size of the training set, for methods that remember samples.
        labels: (num_samples,) class of each training sample, for methods that contrast classes.

    Raises:
        ConfigError: a network, method or class count that does not fit.
        CheckpointError: weights that are missing or of another network.
    """
    cfg, info = resolve_inputs(cfg), dataset_info(cfg.DATASETS.NAME)
    num_classes = cfg.MODEL.NUM_CLASSES or info.num_classes
    if num_classes is None:
        raise ConfigError(f"MODEL.NUM_CLASSES: data set {info.name} has no fixed number of classes; set it")
    student = student or build_network(cfg, "MODEL.STUDENT", cfg.MODEL.STUDENT, num_classes)
    teachers, weights, norms = [], [], []
    if any(method.needs_teacher for method in chosen_methods(cfg).values()):
        given = [] if teacher is None else list(teacher) if isinstance(teacher, Sequence | nn.ModuleList) else [teacher]
        nodes = teacher_nodes(cfg, len(given))
        teachers = given or [build_network(cfg, "MODEL.TEACHER", node, num_classes) for node in nodes]
        weights = [node.SHARE for node in nodes]
        norms = [Normalize.of(node, info) for node in nodes]
    student_info, *teacher_infos = (
        replace(network_info(network, image_size(cfg)), sigmoid=info.multi_label) for network in (student, *teachers)
    )
    distillers = _build_methods(cfg, student_info, teacher_infos, TrainingData(num_samples, labels))
    source = None
    if teachers:
        sources = [LiveTeacher(network, norm) for network, norm in zip(teachers, norms, strict=True)]
        source = sources[0] if len(sources) == 1 else TeacherEnsemble(sources, weights)
        source.serve(method for method in distillers.values() if method.needs_teacher)
    student_norm = Normalize.of(cfg.MODEL.STUDENT, info)
    class_weights = _class_weights(cfg.SOLVER.CLASS_WEIGHTS, num_classes)
    model = DistillModel(
        student,
        teachers,
        source,
        distillers,
        student_norm,
        norms,
        cfg.DISTILL.CE_WEIGHT,
        class_weights,
        info.multi_label,
    )
    return model.to(resolve_device(cfg))


def _class_weights(weights: str | Sequence[float], num_classes: int) -> Tensor | None:
    if not weights:
        return None
    if isinstance(weights, str):
        raise ConfigError(
            f"SOLVER.CLASS_WEIGHTS {weights} depends on the data set: load_datasets(cfg) sets the numbers"
        )
    if len(weights) != num_classes:
        raise ConfigError(f"SOLVER.CLASS_WEIGHTS has {len(weights)} numbers for {num_classes} classes")
    return torch.tensor(weights, dtype=torch.float32)


def _build_methods(
    cfg: CfgNode, student: NetworkInfo, teachers: Sequence[NetworkInfo], data: TrainingData
) -> dict[str, Distiller]:
    methods, distillers = chosen_methods(cfg), {}
    mixed = [key for key in ("MIXUP", "CUTMIX") if cfg.INPUT[key]]
    for name, method in methods.items():
        node = cfg.DISTILL[name.upper()]
        number = node.get("TEACHER", 0)
        if method.needs_teacher and not 0 <= number < len(teachers):
            key = f"DISTILL.{name.upper()}.TEACHER"
            raise ConfigError(f"{name} needs teacher {number} ({key}), but MODEL.TEACHER.NAME names {len(teachers)}")
        if (mixed or student.sigmoid) and not method.takes_soft_target:
            # Methods that read logits are for softmaxes, unless they say otherwise.
            able = ", ".join(
                other
                for other, kind in DISTILLERS
                if kind.takes_soft_target and (kind.takes_sigmoid or not student.sigmoid or "logits" not in kind.needs)
            )
            several = f"INPUT.{mixed[0]} mixes images; set it to 0, or" if mixed else "these have several;"
            raise ConfigError(
                f"DISTILL.METHODS: {name} needs the one class of each image, but {several} choose among {able}"
            )
        classes = {teacher.num_classes for teacher in teachers}
        if "logits" in method.needs and "TEACHER" not in node and len(classes) > 1:
            raise ConfigError(f"DISTILL.METHODS: {name} averages the teachers' logits, but they have {classes} classes")
        try:
            distillers[name.lower()] = method(node, student, teachers[number] if method.needs_teacher else None, data)
        except ValueError as error:
            raise ConfigError(f"DISTILL.METHODS: {error}") from error
    if "ce" in distillers:
        raise ConfigError("DISTILL.METHODS: a method called CE would replace the cross-entropy's loss_ce; rename it")
    shipped = [name for name, method in methods.items() if method.deployed is not Distiller.deployed]
    if len(shipped) > 1:
        raise ConfigError(f"DISTILL.METHODS {shipped} each change the deployed student: choose one of them")
    return distillers
