"""Mix-in that adds a frozen teacher and distillation losses to a Detectron2 meta-architecture."""

import logging
from contextlib import nullcontext
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import Backbone
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from d2distill.common.config import chosen_methods
from d2distill.common.distillers import Distiller
from d2distill.common.errors import ConfigError
from d2distill.common.modules import ModuleCall, capture_calls, captured_extras, shared_copy
from d2distill.common.outputs import Batch, NetworkInfo, Outputs, Progress
from d2distill.common.teachers import exclude_teacher_from_state_dict
from d2distill.detection.config import num_classes
from d2distill.detection.data.catalog import check_trained_classes
from d2distill.detection.meta_arch.teacher_source import DetectorTeacher, feature_strides, needs_head
from d2distill.detection.teacher import TeacherAdapter, build_teacher

__all__ = ["DistillDetector"]

logger = logging.getLogger("detectron2.d2distill")

#: The calls of the student's submodules within one forward pass, by the names of :meth:`hooked_modules`.
Calls = dict[str, list[ModuleCall]]


class DistillDetector(nn.Module):
    """Goes before one of Detectron2's meta-architectures: its losses, and after them those of the methods.

    The detector itself runs as Detectron2 wrote it; what the methods look at is captured on the way. The teacher is
    always in eval mode, in no gradient and in no state dict.

    Args:
        teacher: None for plain training, and for methods that need none.
        distillers: methods by lower-case name.
        max_iter: of the training, for the methods' `Progress`.
        teacher_stream: on a GPU, run what of the teacher does not wait for the student on a CUDA stream of its own.
        kwargs: of the meta-architecture.

    Attributes:
        teacher: the teacher's network, a child named as in published checkpoints, or None.
        teacher_adapter: what belongs to it and is no module.
        teacher_source: gives its outputs.
        distillers: a ModuleDict.
        finite: whether the outputs of ``student`` and ``teacher`` in the last training step were finite, 0-d.
    """

    #: What the configuration asks of a meta-architecture when DISTILL.METHODS is not empty.
    takes_methods = True
    #: Whether the teacher's head looks at the student's proposals, and so waits for the student.
    head_takes_proposals = True

    @configurable
    def __init__(
        self,
        *,
        teacher: TeacherAdapter | None = None,
        distillers: dict[str, Distiller] | None = None,
        max_iter: int = 0,
        teacher_stream: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.distillers = nn.ModuleDict(distillers or {})
        self.teacher = None if teacher is None else teacher.network
        self.teacher_adapter = teacher
        self.max_iter = max_iter
        methods = self.distillers.values()
        self.finite: dict[str, Tensor | None] = {}
        self._student_needs = {need for method in methods for need in method.student_needs}
        needs = self._student_needs | {need for method in methods for need in method.teacher_needs}
        self._compares_logits = any(map(needs_head, needs))
        self._levels = list(feature_strides(self.backbone)) if "feats" in needs else []
        self.teacher_source = None if teacher is None else DetectorTeacher(self, teacher_stream)
        if self.teacher_source is not None:
            self.teacher_source.serve(method for method in methods if method.needs_teacher)
        exclude_teacher_from_state_dict(self)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of the constructor. The student comes first: its weights do not depend on what follows."""
        parts = super().from_config(cfg)
        methods = chosen_methods(cfg)
        teacher = build_teacher(cfg) if any(method.needs_teacher for method in methods.values()) else None
        infos = [cls.network_info(cfg, parts["backbone"])]
        if teacher is not None:
            infos.append(cls.network_info(teacher.cfg, teacher.network.backbone, module=teacher.network))
        distillers = {}
        for name, method in methods.items():
            if teacher is not None and method.needs_teacher:
                if "feats" in method.needs:
                    check_levels(parts["backbone"], teacher.network.backbone, name)
                if any(map(needs_head, method.needs)):
                    cls.check_comparable(parts, teacher.network, name)
                if "logits" in method.needs:
                    check_num_classes(cfg, teacher.cfg, name)
            try:
                distillers[name.lower()] = method(cfg.DISTILL[name.upper()], *infos)
            except ValueError as error:
                raise ConfigError(f"DISTILL.METHODS: {error}") from error
            if method.deployed is not Distiller.deployed:
                raise ConfigError(f"DISTILL.METHODS: {name} changes the deployed student: it is for classifiers only")
        # Only now, so that what does not fit is reported before a long download.
        if teacher is not None:
            trained = teacher.load_weights()
            if any(map(needs_head, (need for method in methods.values() for need in method.needs))):
                check_trained_classes(f"{teacher.key}: {teacher.weights}", trained, cfg.DATASETS.TRAIN[:1])
            own, theirs = num_classes(cfg)[1], num_classes(teacher.cfg)[1]
            if own != theirs:
                logger.info(
                    f"The teacher has {theirs} classes and the student {own}: their features are compared, and the "
                    "teacher's AP is not measured"
                )
        # A configuration of stock Detectron2 with add_distill_config has no settings of the run.
        stream = cfg.SOLVER.get("TEACHER_STREAM", True)
        solver = {"max_iter": cfg.SOLVER.MAX_ITER, "teacher_stream": stream}
        return {**parts, "teacher": teacher, "distillers": distillers, **solver}

    @classmethod
    def network_info(cls, cfg: CfgNode, backbone: Backbone, **more: Any) -> NetworkInfo:
        """Shapes of the outputs of a detector of this kind; `more` are other fields."""
        shapes = backbone.output_shape()
        feats = tuple((shapes[name].channels,) for name in feature_strides(backbone))
        return NetworkInfo(**cls.logits_info(cfg), feats=feats, **more)

    @classmethod
    def logits_info(cls, cfg: CfgNode) -> dict[str, Any]:
        """The number of classes of the logits, and whether they are those of sigmoids."""
        raise NotImplementedError

    @classmethod
    def check_comparable(cls, parts: dict[str, Any], teacher: nn.Module, method: str) -> None:
        """Raise a ConfigError where class logits of student and teacher cannot be compared row by row."""
        raise NotImplementedError

    def hooked_modules(self) -> dict[str, nn.Module]:
        """The modules whose calls are captured during the detector's own forward pass."""
        return {"backbone": self.backbone}

    def student_logits(self, calls: Calls) -> tuple[Tensor, Tensor]:
        """Logits (R, C), and the class of each row (R,), of the captured forward pass."""
        raise NotImplementedError

    def teacher_head(self, maps: dict[str, Tensor]) -> Any:
        """What the teacher computes from its own maps before the student is done; without an override, nothing more."""
        return maps

    def teacher_logits(self, calls: Calls, found: Any) -> Tensor:
        """The teacher's logits (R, C) from its :meth:`teacher_head`, row by row those of :meth:`student_logits`."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "DistillDetector":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def deployed_student(self) -> nn.Module:
        """The plain detector: it shares its parameters with this one and has no teacher and no methods."""
        student = shared_copy(self, {"teacher": None, "distillers": nn.ModuleDict()})
        student.teacher_adapter = student.teacher_source = None
        return student

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Losses in training mode, one ``loss_<method>`` each after the detector's own; else Detectron2's results.

        Args:
            batched_inputs: as Detectron2's meta-architectures take them, images in the student's INPUT.FORMAT.
        """
        if not self.training or not self.distillers:
            return super().forward(batched_inputs)
        # One copy to the device, for both networks; from the loader's pinned memory it is not waited for.
        batched_inputs = [{**x, "image": x["image"].to(self.device, non_blocking=True)} for x in batched_inputs]
        source = self.teacher_source
        with (
            capture_calls(self.hooked_modules()) as calls,
            captured_extras(self, self._student_needs) as extras,
            nullcontext() if source is None else source.beside_student(batched_inputs) as early,
        ):
            losses = super().forward(batched_inputs)
        student = Outputs(extras=extras)
        batch = self._batch_info(batched_inputs, {"calls": calls, "teacher": early})
        if self._compares_logits:
            student.logits, batch.target = self.student_logits(calls)
        teacher = None if source is None else source(batched_inputs, batch)
        if self._levels:
            student.feats = [calls["backbone"][0].output[name] for name in self._levels]
            if teacher is not None and teacher.feats is not None:
                pairs = [crop_to_common_size(*maps) for maps in zip(student.feats, teacher.feats, strict=True)]
                student.feats, teacher.feats = ([pair[side] for pair in pairs] for side in (0, 1))
        self.finite = {"student": student.is_finite()} | ({} if teacher is None else {"teacher": teacher.is_finite()})
        for name, method in self.distillers.items():
            if f"loss_{name}" in losses:
                raise ConfigError(f"DISTILL.METHODS: loss_{name} is a loss of the detector itself; rename the method")
            term = method(student, method.pick_teacher(teacher), batch)
            losses[f"loss_{name}"] = method.weight(batch.progress) * term
        return losses

    def _batch_info(self, batched_inputs: list[dict[str, Any]], extras: dict[str, Any]) -> Batch:
        step = get_event_storage().iter
        return Batch(
            progress=Progress(step, None, step / self.max_iter if self.max_iter else 0.0),
            boxes=[x["instances"].gt_boxes.tensor.to(self.device) for x in batched_inputs],
            image_sizes=[tuple(x["image"].shape[-2:]) for x in batched_inputs],
            extras=extras,
        )


def check_levels(student: Backbone, teacher: Backbone, method: str) -> None:
    """Raise a ConfigError where two backbones do not give maps of the same names and strides."""
    strides = feature_strides(student), feature_strides(teacher)
    if strides[0] != strides[1]:
        raise ConfigError(
            f"DISTILL.METHODS: {method} compares feature maps level by level, but the student's have the strides "
            f"{strides[0]} and the teacher's {strides[1]}: choose backbones of the same kind, e.g. both with FPN"
        )


def check_num_classes(student: CfgNode, teacher: CfgNode, method: str) -> None:
    """Raise a ConfigError where two detectors have other numbers of classes."""
    (key, own), (teacher_key, theirs) = num_classes(student), num_classes(teacher)
    if own != theirs:
        raise ConfigError(
            f"DISTILL.METHODS: {method} compares class logits, but the student has {own} classes ({key}) and the "
            f"teacher {theirs} (TEACHER.{teacher_key}): take a teacher of the same classes, or methods on features"
        )


def crop_to_common_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (N, C, H, W) of two networks without the rows and columns that only one of them has.

    They begin at the same pixel; networks that pad images to multiples of different sizes end at different ones.
    """
    height, width = (min(sizes) for sizes in zip(one.shape[2:], other.shape[2:], strict=True))
    return one[..., :height, :width], other[..., :height, :width]
