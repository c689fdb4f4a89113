"""Where a teacher's outputs come from. No trainer and no method asks which kind of source it is."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2distill.common.distillers import Distiller
from d2distill.common.engine.compiling import CompiledOrEager, FrozenNetwork
from d2distill.common.engine.cuda_graphs import CudaGraph
from d2distill.common.modules import MODULE_PREFIX, captured_extras
from d2distill.common.outputs import Batch, Outputs

__all__ = ["LiveTeacher", "TeacherEnsemble", "TeacherSource", "exclude_teacher_from_state_dict"]

logger = logging.getLogger("detectron2.d2distill")
_PREFIX = "teacher."


class TeacherSource(ABC):
    """Gives the teacher's `Outputs` for a batch.

    Attributes:
        needs: the parts of `Outputs` that the chosen methods read.
        extras: what they ask for beyond those: a function of the network and its images, by name.
    """

    def __init__(self) -> None:
        self.needs: set[str] = set()
        self.extras: dict[str, Callable[[nn.Module, Tensor], Any]] = {}

    def serve(self, distillers: Iterable[Distiller]) -> None:
        """Provide from now on what these methods need."""
        for distiller in distillers:
            self.needs |= distiller.teacher_needs
            self.extras |= distiller.teacher_extras

    def compile(self, rows: int) -> None:
        """Run the network compiled from now on, `rows` images at a time, see :class:`.FrozenNetwork`, where this can.

        Called when it is known whom it serves. The log says what is not compiled.
        """
        logger.info(f"{type(self).__name__} is not compiled, and runs eagerly")

    def replay(self, device: torch.device) -> None:
        """Run the network on this GPU as a :class:`.CudaGraph` from now on, where this can; after :meth:`compile`.

        A call's outputs are then gone with the next call.
        """
        logger.info(f"{type(self).__name__} is not replayed as a CUDA graph")

    @abstractmethod
    def __call__(self, inputs: Any, batch: Batch) -> Outputs:
        """`inputs` are the images as the task's loader gives them, not normalized, and `batch` what else is known."""


class LiveTeacher(TeacherSource):
    """A frozen network in eval mode, run on every batch without gradients.

    Args:
        network: has ``outputs(images)``.
        prepare: makes the network's images of the task's: its own normalization.
    """

    def __init__(self, network: nn.Module, prepare: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.prepare = prepare
        self._outputs: Callable[[Tensor], Outputs] = self._run_eagerly
        self._run: Callable[[Any], Outputs] = self._prepare_and_run

    def compile(self, rows: int) -> None:
        name = f"The teacher {type(self.network).__name__}"
        inner = sorted(need for need in self.needs if need.startswith(MODULE_PREFIX))
        if inner:
            logger.info(
                f"{name} runs eagerly: a method reads {', '.join(inner)}, which a compiled network does not give"
            )
        elif self.needs:
            frozen = FrozenNetwork(self.network, self.needs, rows)
            self._outputs = CompiledOrEager(name, frozen, self._run_eagerly)

    def replay(self, device: torch.device) -> None:
        self._run = CudaGraph(f"The teacher {type(self.network).__name__}", self._prepare_and_run, device)

    # Not in inference mode, whose tensors no trainable part of a method could take.
    @torch.no_grad()
    def __call__(self, inputs: Any, batch: Batch) -> Outputs:
        return self._run(inputs)

    def _prepare_and_run(self, inputs: Any) -> Outputs:
        images = self.prepare(inputs)
        outputs = self._outputs(images) if self.needs else Outputs()
        for name, provide in self.extras.items():
            outputs.extras[name] = provide(self.network, images)
        return outputs

    def _run_eagerly(self, images: Tensor) -> Outputs:
        with captured_extras(self.network, self.needs) as captured:
            outputs = self.network.outputs(images).select(self.needs)
        outputs.extras.update(captured)
        return outputs


class TeacherEnsemble(TeacherSource):
    """Several teachers: its outputs are theirs, with their weights.

    Args:
        sources: one each.
        weights: how much each counts; they sum to 1.
    """

    def __init__(self, sources: Sequence[TeacherSource], weights: Sequence[float]) -> None:
        super().__init__()
        self.sources, self.weights = list(sources), list(weights)

    def serve(self, distillers: Iterable[Distiller]) -> None:
        # A method that uses one teacher of several asks nothing of the others.
        distillers = list(distillers)
        for number, source in enumerate(self.sources):
            source.serve(method for method in distillers if method.cfg.get("TEACHER", number) == number)

    def compile(self, rows: int) -> None:
        for source in self.sources:
            source.compile(rows)

    def replay(self, device: torch.device) -> None:
        for source in self.sources:
            source.replay(device)

    def __call__(self, inputs: Any, batch: Batch) -> Outputs:
        outputs = [source(inputs, batch) for source in self.sources]
        return Outputs(members=list(zip(self.weights, outputs, strict=True)))


def exclude_teacher_from_state_dict(model: nn.Module) -> None:
    """Make ``model.state_dict()`` end without, and ``model.load_state_dict()`` expect nothing of, ``model.teacher``."""
    model.register_state_dict_post_hook(_drop)
    model.register_load_state_dict_post_hook(_expect_none)


def _drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in [name for name in state if name.startswith(prefix + _PREFIX)]:
        del state[name]


def _expect_none(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.startswith(_PREFIX)]
