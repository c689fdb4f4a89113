"""Work of fixed shapes as CUDA graphs: the GPU gets all of its kernels at once, where small networks otherwise wait for
Python to launch them one by one."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2distill.common.outputs import Progress

__all__ = ["CudaGraph", "map_tensors"]

logger = logging.getLogger("detectron2.d2distill")
#: Calls in which kernels are chosen, compiled and given their workspaces, before the one that is captured.
WARMUP_CALLS = 3


class CudaGraph:
    """A function of tensors that is captured as a CUDA graph after a few calls, and replayed from then on.

    It is captured for the shapes that it is the first to have been called with several times. For others it runs as it
    is, and for all where it cannot be captured: where it waits for the device or reads what is on the host. The log
    says so.

    Args:
        name: of what it is, for the log.
        function: of nested dicts, lists, tuples and dataclasses of tensors and plain values, on a GPU or on their way
            to it; gives the like. A `Progress` is for the calls before the capture: a graph cannot follow it.
        parameters: whose gradients the function leaves in ``grad``, where it found None.
        inputs: makes the function's arguments of the call's.

    Returns:
        By a call, the function's results, which the next call overwrites.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        device: torch.device,
        parameters: Iterable[nn.Parameter] = (),
        inputs: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        self.name, self.function, self.device, self.parameters = name, function, device, list(parameters)
        self.inputs = inputs
        self.failed = False
        self._calls, self._shapes = Counter(), ()
        self._replay: Callable[[], None] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.inputs is not None:
            args = self.inputs(*args)
        shapes = () if self.failed else tuple(_shapes(args))
        if self._replay is None and not self.failed:
            self._calls[shapes] += 1
            if self._calls[shapes] > WARMUP_CALLS:
                self._shapes = shapes
                self._capture(args)
        if self._replay is None or shapes != self._shapes:
            return self.function(*args)
        for own, given in zip(self._inputs, _tensors(args), strict=True):
            own.copy_(given, non_blocking=True)
        self._replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._results

    def _capture(self, args: tuple[Any, ...]) -> None:
        own = map_tensors(lambda part: part.detach().to(self.device, copy=True), args, _NotInGraphs())
        try:
            self._replay, self._results = capture(lambda: self.function(*own))
        except Exception as error:
            self.failed = True
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            logger.warning(f"{self.name} is not replayed as a CUDA graph: {type(error).__name__}: {reason}")
        else:
            logger.info(f"{self.name} is replayed as a CUDA graph")
            self._inputs = [*_tensors(own)]
            # Of the graph's memory, which each replay writes.
            self._gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]
        for parameter in self.parameters:
            parameter.grad = None


def capture(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """The kernels of a call as something to run again, and its results, which hold values from the first run on."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # The threads of data loaders allocate pinned memory meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = function()
    except Exception:
        # What torch leaves undone where a capture cannot be ended: it stays on the capture's stream, and its generators
        # still count for the graph, and refuse all other draws.
        torch.cuda.set_stream(stream)
        for generator in torch.cuda.default_generators:
            generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph.replay, results


class _NotInGraphs:
    """In the place of a `Progress`."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"it reads batch.progress.{name}, which changes from step to step")


def map_tensors(function: Callable[[Tensor], Tensor], value: Any, progress: Any = None) -> Any:
    """`value` with `function` of each tensor in it, and with `progress`, if that is given, for each `Progress`."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Progress):
        return progress or value
    if isinstance(value, dict):
        return {name: map_tensors(function, part, progress) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, part, progress) for part in value)
    if is_dataclass(value):
        return type(value)(**map_tensors(function, _fields(value), progress))
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda part: found.append(part) or part, value)
    return iter(found)


def _shapes(value: Any) -> Iterator[Any]:
    """What must be equal for a graph to be that of another call."""
    if isinstance(value, Tensor):
        yield value.shape, value.dtype
    elif is_dataclass(value) and not isinstance(value, Progress):
        yield from _shapes(_fields(value))
    elif isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from _shapes(part)
    elif isinstance(value, list | tuple):
        yield len(value)
        for part in value:
            yield from _shapes(part)
    elif not isinstance(value, Progress):
        yield value


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}
