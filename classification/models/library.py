"""What library models (``timm:NAME``, ``torchvision:NAME``) share.

A library's model keeps its class, its ``forward`` and its state_dict names, so its checkpoints load; it only
gains ``outputs``, ``classifier_layer`` and ``bn_before_relu``, through a subclass made on the fly.

Their ``feats``: entry 0 is a stem at the coarsest resolution that comes before the first stage (patch embedding,
stem convolution), the rest the last map of each resolution; of networks with one resolution (ViT) the stem and
four evenly spaced blocks. Token sequences and channels-last maps become (N, C, H, W), class tokens dropped.
``preacts`` is None: where a last ReLU is, if there is one, no library tells.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from d2distill.common.outputs import Outputs

from .base import on_vectors


class LibraryModel:
    """Mixin that goes in front of a library's class.

    Attributes:
        classifiers: names of the layers that make the logits; several in distilled transformers, none without classes.
    """

    bn_before_relu = None
    classifiers: list[str]

    def outputs(self, images: Tensor) -> Outputs:
        """As :meth:`.base.FeatureClassifier.outputs`, in one run of the network; ``preacts`` is None."""
        raise NotImplementedError

    @property
    def classifier_layer(self) -> nn.Module | None:
        """As :attr:`.base.FeatureClassifier.classifier_layer`; None where no single layer makes the logits.

        Not ``classifier``: many networks have a layer of that name, which need not be the last one.
        """
        return on_vectors(self.get_submodule(self.classifiers[0])) if len(self.classifiers) == 1 else None

    def __reduce_ex__(self, protocol: int) -> tuple:
        # pickle and deepcopy look classes up by name, which a class made on the fly does not have.
        mixin, library_class = type(self).__bases__
        return _new, (mixin, library_class), self.__dict__.copy()


@functools.cache
def _subclass(mixin: type, library_class: type) -> type:
    return type(library_class.__name__, (mixin, library_class), {"__doc__": library_class.__doc__})


def _new(mixin: type, library_class: type) -> nn.Module:
    subclass = _subclass(mixin, library_class)
    return subclass.__new__(subclass)


def adopt(model: nn.Module, mixin: type, classifiers: list[str]) -> nn.Module:
    """Put ``mixin``, a :class:`LibraryModel`, in front of the class of ``model``, in place."""
    model.__class__ = _subclass(mixin, type(model))
    model.classifiers = classifiers
    return model


@contextmanager
def hooked(hooks: list[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Forward hooks ``hook(module, inputs, output)`` that live as long as the block."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class PooledRecorder:
    """Keeps what enters the classifiers, as (N, D)."""

    def __init__(self, model: nn.Module):
        self.inputs: list[Tensor] = []
        self.hooks = [(model.get_submodule(name), self) for name in model.classifiers]

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        # A convolution may classify every position and average afterwards (SqueezeNet).
        self.inputs.append(x.mean(dim=(2, 3)) if x.ndim == 4 else x.flatten(1))

    def pooled(self) -> Tensor:
        """Two heads on tokens of the same width (distilled transformers) are averaged, as their logits are."""
        if len(self.inputs) == 1:
            return self.inputs[0]
        same = len({x.shape for x in self.inputs}) == 1
        return torch.stack(self.inputs).mean(0) if same else torch.cat(self.inputs, dim=1)


def tokens_to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, L, C) to (N, C, height, width); class tokens and the like come before the grid and are dropped."""
    grid = tokens[:, tokens.shape[1] - height * width :]
    return grid.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)


def evenly_spaced(count: int, wanted: int = 4) -> list[int]:
    """``wanted`` of ``range(count)``, the last one included: 12 gives 2, 5, 8, 11."""
    wanted = min(count, wanted)
    return [(i + 1) * count // wanted - 1 for i in range(wanted)]


def last_classifier(model: nn.Module, num_classes: int) -> str:
    """Name of the last linear layer (else convolution) with ``num_classes`` outputs."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    # Weights begin with the outputs in both.
    fitting = [(isinstance(layer, nn.Linear), name) for name, layer in layers if len(layer.weight) == num_classes]
    linear = [name for is_linear, name in fitting if is_linear]
    return (linear or [name for _, name in fitting])[-1]
