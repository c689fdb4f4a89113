"""What every distillation method is: a module that turns two networks' outputs into losses."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.common.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor, nn

from d2distill.common.distillers._numerics import upcast, zero_mean
from d2distill.common.outputs import Outputs, OutputSpec

__all__ = ["DISTILLERS", "Context", "Distiller", "LogitDistiller", "standardize_logits"]


class _Methods(Registry):
    def _do_register(self, name: str, obj: Any) -> None:
        # A trainer keeps methods in a ModuleDict by lower-case name; there torch would say: attribute 'pop' exists.
        if hasattr(nn.ModuleDict(), name.lower()):
            raise ValueError(
                f"a method cannot be called {name}: {name.lower()} is an attribute of torch's ModuleDict, which holds "
                "the methods of a training; choose another class name"
            )
        super()._do_register(name, obj)


DISTILLERS = _Methods("DISTILLERS")
DISTILLERS.__doc__ = """
Distillation methods by name. The class name is the method's name; its settings are the node
``DISTILL.<NAME IN CAPITALS>``, its loss is logged as ``loss_<name in lower case>``.
"""


@dataclass
class Context:
    """What a method may know of the step besides outputs and targets. Fields may be added, never removed.

    Attributes:
        time: training time in the unit of WARMUP: the epoch, counted from 1, in classification,
            the iteration in detection.
        index: (N,) positions of the samples in the data set.
        contrast_index: (N, 1 + K) positions of the positive and the negatives, where the loader gives them.
    """

    time: float = 0.0
    index: Tensor | None = None
    contrast_index: Tensor | None = None


class Distiller(nn.Module):
    """Base of all methods. A subclass states `needs`, `defaults()` and `losses()`.

    Args:
        cfg: the method's own node, ``cfg.DISTILL.<NAME>``.
        student_spec, teacher_spec: shapes of the two networks' outputs; connectors are built from them.
            The teacher's is None where there is no teacher.
        num_samples: size of the training set (memory banks), or None if unknown.

    Raises:
        ValueError: a WEIGHT, WARMUP or temperature that makes no sense; a network lacks a part that the method needs,
            or is missing; for a method on logits also: the class counts differ, there is one class alone, or the
            scores are sigmoids where it takes a softmax, or of different kinds.
    """

    #: The fields of `Outputs` that the method reads, of both networks.
    needs: tuple[str, ...] = ("logits",)
    #: False for a method that looks at the student alone; it is then given None for the teacher's part.
    needs_teacher = True
    #: True for a method on logits that also takes class scores which are independent sigmoids (`OutputSpec.sigmoid`).
    takes_sigmoid = False
    #: Whether the teacher's batch norms use the batch's statistics (its running ones stay as they are).
    teacher_batch_statistics = False

    def __init__(
        self,
        cfg: CfgNode,
        student_spec: OutputSpec,
        teacher_spec: OutputSpec | None = None,
        num_samples: int | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self._check_settings()
        if self.needs_teacher and teacher_spec is None:
            raise ValueError(f"{self.name} needs a teacher, but there is none")
        sides = {"student": student_spec, "teacher": teacher_spec} if self.needs_teacher else {"student": student_spec}
        for part in self.needs:
            field = "num_classes" if part == "logits" else part
            for side, spec in sides.items():
                if getattr(spec, field) is None:
                    of = "both networks" if self.needs_teacher else "the student"
                    raise ValueError(f"{self.name} needs the {part} of {of}, but the {side} gives none")
        if "logits" in self.needs:
            self._check_class_scores(sides)

    def _check_settings(self) -> None:
        for key, value in self.cfg.items():
            temperature = key == "T" or key.endswith("_T")
            # Written so that NaN is refused as well.
            if temperature and not 0 < value < math.inf:
                raise ValueError(f"{self.name}: {key} is {value}, but a temperature is above 0")
            if key in ("WEIGHT", "WARMUP") and not 0 <= value < math.inf:
                raise ValueError(f"{self.name}: {key} is {value}, but must be 0 or more")

    def _check_class_scores(self, sides: dict[str, OutputSpec]) -> None:
        of_sigmoids = [side for side, spec in sides.items() if spec.sigmoid]
        if of_sigmoids and not self.takes_sigmoid:
            raise ValueError(
                f"{self.name} takes a softmax of the class scores, but the {of_sigmoids[0]}'s are independent "
                "sigmoids: choose a method for those"
            )
        if len(of_sigmoids) == 1 < len(sides):
            (softmax,) = sides.keys() - set(of_sigmoids)
            raise ValueError(
                f"{self.name} compares class scores, but the {of_sigmoids[0]}'s are independent sigmoids and the "
                f"{softmax}'s one softmax: networks of one kind are needed"
            )
        counts = [spec.num_classes for spec in sides.values()]
        if len(set(counts)) > 1:
            raise ValueError(
                f"{self.name} compares class scores, but the student has {counts[0]} classes and the teacher "
                f"{counts[1]}"
            )
        if counts[0] < 2 and not of_sigmoids:
            raise ValueError(f"{self.name} compares classes with each other, but there is {counts[0]}")

    @classmethod
    def common_defaults(cls) -> dict[str, Any]:
        """The settings of every method of this kind; `defaults()` may give them other values."""
        # Of several teachers a method on features looks at number TEACHER; one on logits looks at all of them.
        return {"WEIGHT": 1.0, "WARMUP": 0, "TEACHER": 0}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The method's own settings with their default values; those of `common_defaults()` are there as well."""
        return {}

    @property
    def name(self) -> str:
        return type(self).__name__

    def set_labels(self, labels: Tensor) -> None:
        """Called once before training where the classes of all training samples are known.

        Args:
            labels: (num_samples,) class of each sample, in the order of `Context.index`.
        """

    def losses(self, student: Outputs, teacher: Outputs | None, target: Tensor, ctx: Context) -> dict[str, Tensor]:
        """The method's terms before WEIGHT and WARMUP: 0-d tensors under names that start with ``loss_<name>``.

        Args:
            student, teacher: outputs for the same images; no gradient reaches the teacher's. The teacher's are None
                where there is no teacher.
            target: (N,) class of each row of the logits.
        """
        raise TypeError(f"{self.name} defines no losses()")

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor, ctx: Context) -> dict[str, Tensor]:
        """`losses()` times ``WEIGHT * min(time / WARMUP, 1)``."""
        scale = self.cfg.WEIGHT
        if self.cfg.WARMUP > 0:
            scale *= min(ctx.time / self.cfg.WARMUP, 1.0)
        return {name: scale * value for name, value in self.losses(student, teacher, target, ctx).items()}


def standardize_logits(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Logits of each sample with zero mean and unit deviation: a student then learns their order and distances.

    Sun et al.: Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv:2403.01427.

        (logits - mean over classes) / (unbiased standard deviation over classes + eps)

    Args:
        logits: (N, C). Equal logits, and with C = 1 any, become 0 and have no gradient.

    Returns:
        (N, C), at least fp32.
    """
    logits = upcast(logits)
    difference = zero_mean(logits, 1)
    # The norm's gradient is 0 where all logits are equal; that of a square root would be infinite.
    deviation = difference.norm(dim=1, keepdim=True) / max(logits.shape[1] - 1, 1) ** 0.5
    return difference / (deviation + eps)


class LogitDistiller(Distiller):
    """Base of the methods that compare class logits. A subclass states `defaults()` and `logit_loss()`.

    The setting STANDARDIZE compares logits under :func:`standardize_logits`; a method that takes sigmoids has none.
    Several teachers count as one whose probabilities are the average of theirs.
    """

    @classmethod
    def common_defaults(cls) -> dict[str, Any]:
        settings = super().common_defaults()
        del settings["TEACHER"]
        # A softmax does not see its logits' mean; a sigmoid's zero is a threshold, which standardising would move.
        return settings if cls.takes_sigmoid else {**settings, "STANDARDIZE": False}

    def logit_loss(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> Tensor:
        """The method's term: a 0-d tensor from logits (N, C) and target classes (N,)."""
        raise TypeError(f"{self.name} defines no logit_loss()")

    def average(self, members: list[tuple[float, Tensor]]) -> Tensor:
        """The logits (N, C) of one teacher in place of several, given as (share, logits); shares sum to 1.

        Its softmax at the method's T (1 without) is the average, by shares, of theirs.
        """
        return average_softened(members, self.cfg.get("T", 1.0))

    def ensemble_loss(self, logits_student: Tensor, members: list[tuple[float, Tensor]], target: Tensor) -> Tensor:
        """The method's term from several teachers. A method with several temperatures needs an average at each."""
        return self.logit_loss(logits_student, self.average(members), target)

    def losses(self, student: Outputs, teacher: Outputs, target: Tensor, ctx: Context) -> dict[str, Tensor]:
        prepare = standardize_logits if self.cfg.get("STANDARDIZE", False) else upcast
        logits_student = prepare(student.logits)
        if teacher.ensemble is None:
            loss = self.logit_loss(logits_student, prepare(teacher.logits), target)
        else:
            members = [(share, prepare(logits)) for share, logits in teacher.ensemble]
            loss = self.ensemble_loss(logits_student, members, target)
        return {f"loss_{self.name.lower()}": loss}


def average_softened(members: list[tuple[float, Tensor]], temperature: float) -> Tensor:
    """Logits (N, C) whose softmax at `temperature` is the average, by shares, of that of each member's logits."""
    logs = [(logits / temperature).log_softmax(1) + math.log(share) for share, logits in members if share > 0]
    return temperature * torch.stack(logs).logsumexp(0)
