"""What every distillation method is: a module that turns two networks' outputs into one loss term."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from fvcore.common.registry import Registry
from torch import Tensor, nn

from d2distill.common.distillers._numerics import standardize, upcast
from d2distill.common.outputs import Batch, NetworkInfo, Outputs, Progress, TrainingData

if TYPE_CHECKING:  # yacs, PyYAML and iopath, which the loss functions do not use
    from fvcore.common.config import CfgNode

__all__ = ["DISTILLERS", "Distiller", "LogitDistiller", "standardize_logits"]

DISTILLERS = Registry("DISTILLERS")
DISTILLERS.__doc__ = """
Distillation methods by name. The class name is the method's name; its settings are the node
``DISTILL.<NAME IN CAPITALS>``, its loss is logged as ``loss_<name in lower case>``.
"""


class Distiller(nn.Module):
    """Base of all methods. A subclass states `needs`, `defaults()`, `forward()`, and `build()` if it learns something.

    Args:
        cfg: the method's own node, ``cfg.DISTILL.<NAME>``.
        student, teacher: what is known of the two networks; the teacher's is None where there is no teacher.
        data: what is known of the training set.

    Raises:
        ValueError: a WEIGHT, WARMUP or temperature without meaning; a network lacks a part that the method needs, or
            is missing; for a method on logits also: the class counts differ, there is one class alone, or the
            logits are those of sigmoids where it takes a softmax, or of different kinds.
    """

    #: The parts of `Outputs` that the method reads, of both networks. ``module:NAME`` is the output of the submodule of
    #: that name, found in `Outputs.extras` (a list where it is called several times). The needs of an instance, which
    #: are those that count, are its `student_needs` and `teacher_needs`.
    needs: tuple[str, ...] = ("logits",)
    #: False for a method that looks at the student alone; it is then given None for the teacher's part.
    needs_teacher = True
    #: True for a method on logits that also takes those of independent sigmoids (`NetworkInfo.sigmoid`).
    takes_sigmoid = False
    #: False for a method that needs the one class of each image, and so cannot take mixed ones (mixup, cutmix).
    takes_soft_target = True

    def __init__(
        self,
        cfg: "CfgNode",
        student: NetworkInfo,
        teacher: NetworkInfo | None = None,
        data: TrainingData | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.student_needs = set(self.needs)
        self.teacher_needs = set(self.needs) if self.needs_teacher else set()
        #: What the teacher is to provide beyond its outputs: a name in `Outputs.extras`, and a function of the network
        #: and its (normalized) images, called without gradients.
        self.teacher_extras: Mapping[str, Callable[[nn.Module, Tensor], Any]] = {}
        self._check_settings()
        if self.needs_teacher and teacher is None:
            raise ValueError(f"{self.name} needs a teacher, but there is none")
        networks = {"student": student, "teacher": teacher} if self.needs_teacher else {"student": student}
        for part in self.needs:
            field = "num_classes" if part == "logits" else part
            for side, info in networks.items():
                if not part.startswith("module:") and getattr(info, field) is None:
                    of = "both networks" if self.needs_teacher else "the student"
                    raise ValueError(f"{self.name} needs the {part} of {of}, but the {side} gives none")
        if "logits" in self.needs:
            self._check_logits(networks)
        self.build(student, teacher, data or TrainingData())

    def build(self, student: NetworkInfo, teacher: NetworkInfo | None, data: TrainingData) -> None:
        """Called at the end of the constructor: make connectors and memories, refuse what does not fit together."""

    def _check_settings(self) -> None:
        for key, value in self.cfg.items():
            # Written so that NaN is refused as well.
            if (key == "T" or key.endswith("_T")) and not 0 < value < math.inf:
                raise ValueError(f"{self.name}: {key} is {value}, but a temperature is above 0")
            if key in ("WEIGHT", "WARMUP") and not 0 <= value < math.inf:
                raise ValueError(f"{self.name}: {key} is {value}, but must be 0 or more")

    def _check_logits(self, networks: dict[str, NetworkInfo]) -> None:
        of_sigmoids = [side for side, info in networks.items() if info.sigmoid]
        if of_sigmoids and not self.takes_sigmoid:
            raise ValueError(
                f"{self.name} takes a softmax of the class logits, but the {of_sigmoids[0]}'s are independent "
                f"sigmoids: {', '.join(n for n, m in DISTILLERS if m.takes_sigmoid)} can take those"
            )
        if len(of_sigmoids) == 1 < len(networks):
            (softmax,) = networks.keys() - set(of_sigmoids)
            raise ValueError(
                f"{self.name} compares class logits, but the {of_sigmoids[0]}'s are independent sigmoids and the "
                f"{softmax}'s one softmax: networks of one kind are needed"
            )
        counts = [info.num_classes for info in networks.values()]
        if len(set(counts)) > 1:
            raise ValueError(
                f"{self.name} compares class logits, but the student has {counts[0]} classes and the teacher "
                f"{counts[1]}"
            )
        if counts[0] < 2 and not of_sigmoids:
            raise ValueError(f"{self.name} compares classes with each other, but there is {counts[0]}")

    @classmethod
    def common_defaults(cls) -> dict[str, object]:
        """The settings of every method of this kind; `defaults()` may give them other values."""
        return {
            # Weight of the term in the loss.
            "WEIGHT": 1.0,
            # The weight rises linearly from 0 over so many epochs; in detection, iterations.
            "WARMUP": 0,
            # Feature methods use teacher TEACHER; logit methods use the ensemble.
            "TEACHER": 0,
        }

    @classmethod
    def defaults(cls) -> dict[str, object]:
        """The method's own settings with their default values; those of `common_defaults()` are there as well."""
        return {}

    @property
    def name(self) -> str:
        return type(self).__name__

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The method's term, a 0-d tensor; the model multiplies it by :meth:`weight` and names it.

        Args:
            student, teacher: outputs for the same images; no gradient reaches the teacher's. The teacher's are None
                for a method that needs none.
            batch: what else is known of the step.
        """
        raise TypeError(f"{self.name} defines no forward()")

    def weight(self, progress: Progress) -> float:
        """``WEIGHT * min(time / WARMUP, 1)``."""
        return self.cfg.WEIGHT * (min(progress.time / self.cfg.WARMUP, 1.0) if self.cfg.WARMUP > 0 else 1.0)

    def pick_teacher(self, teacher: Outputs | None) -> Outputs | None:
        """Of what the teachers provide the part that :meth:`forward` is given: that of teacher number TEACHER."""
        if not self.needs_teacher:
            return None
        return teacher.members[self.cfg.TEACHER][1] if teacher.members else teacher

    def predict(self, student: Outputs) -> Tensor:
        """Logits of the deployed student: the student's own, unless the method ships with it."""
        return student.logits

    def deployed(self, student: nn.Module) -> nn.Module:
        """The network that is evaluated, saved and exported: the student itself, unless the method ships with it.

        It shares its parameters with `student` and this method.
        """
        return student


def standardize_logits(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Logits of each sample with zero mean and unit deviation: a student then learns their order and distances.

    Sun et al.: Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv:2403.01427.

        (logits - mean over classes) / (unbiased standard deviation over classes + eps)

    Args:
        logits: (N, C). Equal logits, and with C = 1 any, become 0 and have no gradient.

    Returns:
        (N, C), at least fp32.
    """
    return standardize(upcast(logits), (1,), eps)


class LogitDistiller(Distiller):
    """Base of the methods that compare class logits. A subclass states `defaults()` and `forward()`.

    The setting STANDARDIZE compares logits under :func:`standardize_logits`; a method that takes sigmoids has none.
    Several teachers count as one whose probabilities are the average of theirs.
    """

    @classmethod
    def common_defaults(cls) -> dict[str, object]:
        settings = super().common_defaults()
        del settings["TEACHER"]
        # A softmax does not see its logits' mean; a sigmoid's zero is a threshold, which standardizing would move.
        if cls.takes_sigmoid:
            return settings
        return {
            **settings,
            # Compare logits of zero mean and unit deviation per sample (logit standardization).
            "STANDARDIZE": False,
        }

    def pick_teacher(self, teacher: Outputs | None) -> Outputs | None:
        return teacher

    def student_logits(self, student: Outputs) -> Tensor:
        """(N, C), at least fp32, standardized where the settings say so."""
        return self._prepared(student.logits)

    def teacher_logits(self, teacher: Outputs, temperature: float = 1.0) -> Tensor:
        """(N, C) as :meth:`student_logits`; of several teachers those whose softened probabilities are the average.

        Args:
            temperature: at which the probabilities are averaged. With one teacher it changes nothing.
        """
        if not teacher.members:
            return self._prepared(teacher.logits)
        return self.average([(weight, self._prepared(of.logits)) for weight, of in teacher.members], temperature)

    def average(self, members: list[tuple[float, Tensor]], temperature: float) -> Tensor:
        """Logits (N, C) whose softmax at `temperature` is the weighted average of that of each member's logits."""
        logs = [(logits / temperature).log_softmax(1) + math.log(weight) for weight, logits in members if weight > 0]
        return temperature * torch.stack(logs).logsumexp(0)

    def _prepared(self, logits: Tensor) -> Tensor:
        return standardize_logits(logits) if self.cfg.get("STANDARDIZE") else upcast(logits)
