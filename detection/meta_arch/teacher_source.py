"""The teacher's part of a training step: what of it does not wait for the student, and what does."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.modeling import Backbone
from torch import Tensor, nn

from d2distill.common.modules import MODULE_PREFIX, captured_extras
from d2distill.common.outputs import Batch, Outputs
from d2distill.common.teachers import TeacherSource

__all__ = ["DetectorTeacher", "EarlyOutputs", "feature_strides", "needs_head"]


@dataclass
class EarlyOutputs:
    """What a teacher computes of a batch before the student is done; empty until it has begun.

    Attributes:
        images: (N, 3, H, W), as its backbone takes them.
        maps: those of its backbone.
        head: what :meth:`.DistillDetector.teacher_head` made of them; None where no method needs it.
        extras: outputs of its submodules, as in `Outputs`.
    """

    images: Tensor | None = None
    maps: dict[str, Tensor] = field(default_factory=dict)
    head: Any = None
    extras: dict[str, Any] = field(default_factory=dict)


class DetectorTeacher(TeacherSource):
    """A frozen detector that sees the student's images, and for logits the student's proposals or anchors.

    Its backbone, and a head that needs no proposals, run when the student's backbone begins: on a GPU on a stream of
    their own, beside the student's forward pass. The head of an R-CNN waits for the student's proposals. A call needs
    both in `Batch.extras`: ``teacher`` as of :meth:`beside_student`, and ``calls`` of the student's submodules.

    Args:
        student: the :class:`.DistillDetector` whose teacher it is.
        own_stream: False leaves all on the student's stream.
    """

    def __init__(self, student: nn.Module, own_stream: bool = True) -> None:
        super().__init__()
        # Not as an attribute of its own: the student holds this source.
        self._student, self.own_stream = [student], own_stream
        self._stream: torch.cuda.Stream | None = None
        self.takes_students_images = student.teacher_adapter.prepares_like(student)

    @contextmanager
    def beside_student(self, inputs: list[dict[str, Any]]) -> Iterator[EarlyOutputs]:
        """Begin when the student's backbone is called within the block; `inputs` are on the device."""
        (student,), early = self._student, EarlyOutputs()

        def begin(backbone: nn.Module, args: tuple[Tensor]) -> None:
            early.images = args[0] if self.takes_students_images else student.teacher_adapter.images(inputs)
            self._begin(early)

        handle = student.backbone.register_forward_pre_hook(begin)
        try:
            yield early
        finally:
            handle.remove()

    def __call__(self, inputs: list[dict[str, Any]], batch: Batch) -> Outputs:
        (student,), early = self._student, batch.extras["teacher"]
        if self._stream is not None:
            stream = torch.cuda.current_stream(early.images.device)
            stream.wait_stream(self._stream)
            record_stream((early.maps, early.head, early.extras), stream)
        late = {need for need in self.needs if self._is_late(need)}
        with self._without_gradients(), captured_extras(student.teacher, late) as extras:
            logits = student.teacher_logits(batch.extras["calls"], early.head) if self._needs_head else None
        if logits is not None and logits.is_inference():
            logits = logits.clone()
        with torch.no_grad():
            extras |= {name: provide(student.teacher, early.images) for name, provide in self.extras.items()}
        feats = [early.maps[name] for name in feature_strides(student.backbone)] if "feats" in self.needs else None
        return Outputs(logits, feats, extras={**early.extras, **extras})

    def _begin(self, early: EarlyOutputs) -> None:
        """All that does not depend on the student, from the images on."""
        (student,), context = self._student, nullcontext()
        if self.own_stream and early.images.is_cuda:
            self._stream = self._stream or torch.cuda.Stream(early.images.device)
            self._stream.wait_stream(torch.cuda.current_stream(early.images.device))
            early.images.record_stream(self._stream)
            context = torch.cuda.stream(self._stream)
        soon = {need for need in self.needs if not self._is_late(need)}
        with context, self._without_gradients(), captured_extras(student.teacher, soon) as early.extras:
            early.maps = student.teacher.backbone(early.images)
            early.head = student.teacher_head(early.maps) if self._needs_head else None

    @property
    def _needs_head(self) -> bool:
        return any(map(needs_head, self.needs))

    def _is_late(self, need: str) -> bool:
        return needs_head(need) and self._student[0].head_takes_proposals

    def _without_gradients(self) -> AbstractContextManager:
        # Losses cannot keep inference tensors for the backward pass. Logits are copied for that; copies of maps would
        # take more memory than the mode is worth, at most 2 % of a small teacher's time.
        return torch.inference_mode() if self.needs == {"logits"} and not self.extras else torch.no_grad()


def record_stream(value: Any, stream: torch.cuda.Stream) -> None:
    """Keep the memory of a tensor, or of all in a dict, list or tuple, until `stream` has used it."""
    if isinstance(value, Tensor):
        value.record_stream(stream)
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            record_stream(part, stream)


def needs_head(need: str) -> bool:
    """Whether what a method needs comes from the head and not from the backbone alone."""
    return need == "logits" or (need.startswith(MODULE_PREFIX) and not need.startswith(f"{MODULE_PREFIX}backbone"))


def feature_strides(backbone: Backbone) -> dict[str, int]:
    """Names of a backbone's maps and their strides in pixels, from fine to coarse."""
    shapes = backbone.output_shape()
    return {name: shapes[name].stride for name in sorted(shapes, key=lambda name: shapes[name].stride)}
