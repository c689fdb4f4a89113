"""Networks compiled by torch.compile, and what runs in their place where that fails."""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from d2distill.common.outputs import Outputs

__all__ = ["CompiledOrEager", "FrozenNetwork", "TrainedNetwork", "fold_batch_norms"]

logger = logging.getLogger("detectron2.d2distill")


class CompiledOrEager:
    """A function that is compiled at its first call, and its eager form from the call on in which that fails.

    It fails for reasons that torch names at that call alone: no C++ compiler, no Triton, no Python headers, code that
    cannot be traced. The log says so in one line.

    Args:
        name: of what it is, for the log.
        compiled, eager: take the same arguments.
    """

    def __init__(self, name: str, compiled: Callable[..., Any], eager: Callable[..., Any]) -> None:
        self.name, self._compiled, self._eager, self.failed = name, compiled, eager, False

    def __call__(self, *args: Any) -> Any:
        if not self.failed:
            try:
                return self._compiled(*args)
            except Exception as error:
                self.failed = True
                reason = next((line for line in str(error).splitlines() if line.strip()), "")
                logger.warning(f"{self.name} is not compiled, and runs eagerly: {type(error).__name__}: {reason}")
        return self._eager(*args)


class FrozenNetwork:
    """Parts of a frozen network's outputs, in eval mode, from one compiled graph for `rows` images.

    Batch norms are folded into convolutions, weights are constants of the graph and stored as the kernels read them,
    and what none of the parts depends on is not computed. Fewer images are filled up to `rows` and more are run
    in chunks: nothing is compiled twice, and a row's bits do not depend on the batch that it is in.

    The graph is traced with the autocast of the first call, which raises a RuntimeError where it gives other outputs
    than the network. Images of all calls are of one size.

    Args:
        network: has ``outputs(images)``. Its weights do not change any more.
        parts: fields of `Outputs`.
        rows: images at a time.
    """

    def __init__(self, network: nn.Module, parts: Collection[str], rows: int) -> None:
        self.network, self.parts, self.rows = network, sorted(parts), rows
        self._run: Callable[[Tensor], dict[str, Any]] | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Outputs:
        chunks = images.split(self.rows)
        missing = self.rows - len(chunks[-1])
        chunks = [*chunks[:-1], torch.cat([chunks[-1], images.new_zeros(missing, *images.shape[1:])])]
        if self._run is None:
            self._run = self._compile(chunks[0])
        found = [self._run(chunk) for chunk in chunks]
        return Outputs(**{part: _join([each[part] for each in found], len(images)) for part in self.parts})

    def _compile(self, images: Tensor) -> Callable[[Tensor], dict[str, Any]]:
        # torch's compiler takes a second to import, which runs without it do not wait for.
        from torch.fx.experimental.proxy_tensor import make_fx

        def parts(images: Tensor, network: nn.Module = self.network) -> dict[str, Any]:
            outputs = network.outputs(images)
            return {part: getattr(outputs, part) for part in self.parts}

        # Which inductor's own folding is not, where autocast's conversions stand between the two.
        folded = fold_batch_norms(self.network, images)
        # Traced by running it, which sees what hooks do; in a graph of torch's own operations there are none. It has
        # the casts of autocast, and is run without.
        traced = make_fx(partial(parts, network=folded))(images)
        graph = torch.compile(traced, fullgraph=True, dynamic=False, options={"freezing": True})
        run = torch.autocast(images.device.type, enabled=False)(graph)
        expected, found = parts(images), run(images)
        for part in self.parts:
            self._check(part, found[part], expected[part])
        return run

    def _check(self, part: str, found: Any, expected: Any) -> None:
        if isinstance(expected, list):
            for each in zip(found, expected, strict=True):
                self._check(part, *each)
        # Rounding, with half precision of every layer, is less than a mistake is.
        elif (found.float() - expected.float()).norm() > 0.1 * expected.float().norm():
            raise RuntimeError(f"its {part} would be others than those of the eager network")


def fold_batch_norms(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy of a frozen network without those batch norms whose input is a convolution's output, which has their part.

    Found by running it: `network` has ``outputs(images)``. A convolution that something else reads as well gives that
    another value, so that outputs must be compared.
    """
    network, made, uses, alive = copy.deepcopy(network), {}, Counter(), []

    def after_convolution(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        made[id(output)] = module
        alive.append(output)  # so that no other tensor has its id
        uses[module] += 1

    def before_norm(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        uses[module] += 1
        pairs[module] = made.get(id(args[0]))

    pairs: dict[nn.Module, nn.Module | None] = {}
    names = {module: name for name, module in network.named_modules()}
    handles = [m.register_forward_hook(after_convolution) for m in names if type(m) is nn.Conv2d]
    handles += [m.register_forward_pre_hook(before_norm) for m in names if type(m) is nn.BatchNorm2d]
    network.outputs(images)
    for handle in handles:
        handle.remove()
    for norm, convolution in pairs.items():
        if convolution is not None and uses[norm] == uses[convolution] == 1:
            folded = fuse_conv_bn_eval(convolution, norm)
            convolution.weight, convolution.bias = folded.weight, folded.bias
            network.set_submodule(names[norm], nn.Identity())
    return network


def _join(values: list[Any], rows: int) -> Any:
    """The first `rows` rows of tensors, or of lists of them, one after the other."""
    if isinstance(values[0], list):
        return [_join(list(maps), rows) for maps in zip(*values, strict=True)]
    return torch.cat(values)[:rows]


class TrainedNetwork:
    """Parts of a network's outputs in training mode, forward and backward compiled for batches of `rows` images.

    Other batches run eagerly, as the last one of an epoch does. Parameters and buffers stay the network's own.

    Args:
        network: has ``outputs(images)``.
        parts: fields of `Outputs`.
        rows: images of a batch.
    """

    def __init__(self, network: nn.Module, parts: Collection[str], rows: int) -> None:
        self.network, self.parts, self.rows = network, sorted(parts), rows
        self._run = torch.compile(self._parts, fullgraph=True, dynamic=False)

    def __call__(self, images: Tensor) -> Outputs:
        if len(images) != self.rows:
            return self.network.outputs(images)
        return Outputs(**self._run(images))

    def _parts(self, images: Tensor) -> dict[str, Any]:
        outputs = self.network.outputs(images)
        return {part: getattr(outputs, part) for part in self.parts}
