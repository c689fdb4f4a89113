"""What every student detector does with its teacher, whatever its meta-architecture."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from d2distill.common.config import chosen_methods
from d2distill.common.distillers import Context, Distiller
from d2distill.common.engine.teacher import exclude_teacher_from_state_dict, passes, teaching
from d2distill.common.errors import ConfigError
from d2distill.common.outputs import Outputs, OutputSpec
from d2distill.detection.teacher import Teacher, build_teacher

__all__ = ["DistillDetector"]


class DistillDetector(nn.Module):
    """Mix-in before one of Detectron2's meta-architectures: its losses, and after them those of the methods.

    The detector itself runs as Detectron2 wrote it; what the methods look at is recorded on the way. The teacher is
    always in eval mode, in no gradient and in no state dict. A subclass states `watched()`, `student_scores()`,
    `teacher_scores()` and `spec()`.

    Args:
        teacher: None for plain training, and for methods that need none.
        distillers: methods by lower-case name.
        kwargs: of the meta-architecture.

    Attributes:
        teacher: the teacher's network, a child named as in published checkpoints, or None.
        teacher_view: what belongs to it and is no module.
        distillers: a ModuleDict.
    """

    #: What the configuration asks of a meta-architecture when DISTILL.METHODS is not empty.
    takes_methods = True

    def __init__(
        self, *, teacher: Teacher | None = None, distillers: dict[str, Distiller] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.distillers = nn.ModuleDict(distillers or {})
        self.teacher = None if teacher is None else teacher.network
        self.teacher_view = teacher
        needs = {part for distiller in self.distillers.values() for part in distiller.needs}
        self._looks_at_scores = "logits" in needs
        self._levels = list(levels(self.backbone)) if "feats" in needs else []
        exclude_teacher_from_state_dict(self)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of the constructor. The student comes first: its weights do not depend on what follows.

        Raises:
            ConfigError: a method, class count or feature level that does not fit.
            CheckpointError: the teacher's weights are missing or of another network.
        """
        parts = super().from_config(cfg)
        methods = chosen_methods(cfg)
        teacher = build_teacher(cfg) if any(method.needs_teacher for method in methods.values()) else None
        distillers = {}
        for name, method in methods.items():
            if teacher is not None and method.needs_teacher:
                if "feats" in method.needs:
                    check_levels(parts["backbone"], teacher.network.backbone, name)
                if "logits" in method.needs:
                    cls.check_scores(cfg, parts, teacher, name)
            specs = (cls.spec(cfg, parts["backbone"]), teacher and cls.spec(teacher.cfg, teacher.network.backbone))
            try:
                distillers[name.lower()] = method(cfg.DISTILL[name.upper()], *specs)
            except ValueError as error:
                raise ConfigError(f"DISTILL.METHODS: {error}") from error
        # Only now, so that what does not fit is said before a long download.
        if teacher is not None:
            teacher.load_weights()
        return {**parts, "teacher": teacher, "distillers": distillers}

    @classmethod
    def spec(cls, cfg: CfgNode, backbone: Backbone) -> OutputSpec:
        """Shapes of the outputs of a detector of this kind."""
        raise NotImplementedError

    @classmethod
    def check_scores(cls, cfg: CfgNode, parts: dict[str, Any], teacher: Teacher, method: str) -> None:
        """See that class scores of student and teacher can be compared row by row.

        Raises:
            ConfigError: they cannot.
        """
        raise NotImplementedError

    def watched(self) -> dict[str, nn.Module]:
        """The modules whose calls are recorded during the detector's own forward pass."""
        return {"backbone": self.backbone}

    def student_scores(self, calls: dict[str, "Call"]) -> tuple[Tensor, Tensor]:
        """Logits (R, C), and the class of each row (R,), of the pass that was recorded."""
        raise NotImplementedError

    def teacher_scores(self, calls: dict[str, "Call"], maps: dict[str, Tensor]) -> Tensor:
        """The teacher's logits (R, C) from its own maps, row by row those of :meth:`student_scores`."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "DistillDetector":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Losses in training mode, one ``loss_<method>`` each after the detector's own; else Detectron2's results.

        Args:
            batched_inputs: as Detectron2's meta-architectures take them, images in the student's INPUT.FORMAT.
        """
        if not self.training or not self.distillers:
            return super().forward(batched_inputs)
        with recorded(self.watched()) as calls:
            losses = super().forward(batched_inputs)
        logits, target = self.student_scores(calls) if self._looks_at_scores else (None, None)
        student = Outputs(logits=logits)
        if self._levels:
            student.feats = [calls["backbone"].output[name] for name in self._levels]
        methods = self.distillers.values()
        teachers = {by_batch: self._teach(batched_inputs, calls, by_batch) for by_batch in passes(methods)}
        if self._levels:
            # Not in _teach(), where nothing has a gradient: the student's maps keep theirs.
            for teacher in teachers.values():
                pairs = [crop(*maps) for maps in zip(student.feats, teacher.feats, strict=True)]
                student.feats, teacher.feats = ([pair[side] for pair in pairs] for side in (0, 1))
        # Iterations are counted from 0; a warm-up begins with its first part, not with nothing.
        ctx = Context(time=get_event_storage().iter + 1)
        for distiller in methods:
            teacher = teachers[distiller.teacher_batch_statistics] if distiller.needs_teacher else None
            losses.update(distiller(student, teacher, target, ctx))
        return losses

    @torch.no_grad()
    def _teach(self, batched_inputs: list[dict[str, Any]], calls: dict[str, "Call"], by_batch: bool) -> Outputs:
        with teaching(self.teacher, by_batch):
            maps = self.teacher.backbone(self.teacher_view.images(batched_inputs))
            scores = self.teacher_scores(calls, maps) if self._looks_at_scores else None
        return Outputs(scores, feats=[maps[name] for name in self._levels] if self._levels else None)


class Call:
    """Arguments and result of a module's last call."""

    def __init__(self, args: tuple, output: Any) -> None:
        self.args, self.output = args, output


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Call]]:
    """Record the calls of modules within the block, by the names given."""
    calls: dict[str, Call] = {}
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: calls.__setitem__(name, Call(args, output)))
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def levels(backbone: Backbone) -> dict[str, int]:
    """Names of a backbone's maps and their strides in pixels, from fine to coarse."""
    shapes = backbone.output_shape()
    return {name: shapes[name].stride for name in sorted(shapes, key=lambda name: shapes[name].stride)}


def check_levels(student: Backbone, teacher: Backbone, method: str) -> None:
    """See that two backbones give maps of the same names and strides.

    Raises:
        ConfigError: they do not.
    """
    sides = [
        ", ".join(f"{name} (stride {stride})" for name, stride in levels(side).items()) for side in (student, teacher)
    ]
    if sides[0] != sides[1]:
        raise ConfigError(
            f"DISTILL.METHODS: {method} compares feature maps level by level, but the student's are {sides[0]} and the "
            f"teacher's {sides[1]}: choose backbones of the same kind, e.g. both with FPN"
        )


def crop(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (N, C, H, W) of two networks without the rows and columns that only one of them has.

    They begin at the same pixel; networks that pad images to multiples of different sizes end at different ones.
    """
    height, width = (min(sizes) for sizes in zip(one.shape[2:], other.shape[2:], strict=True))
    return one[..., :height, :width], other[..., :height, :width]
