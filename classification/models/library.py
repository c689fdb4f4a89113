"""``timm:NAME`` and ``torchvision:NAME``: the libraries' classifiers, looked into.

A library's model keeps its class, its ``forward`` and its state_dict names, so its checkpoints load; it only
gains ``outputs``, ``classifier_layer`` and ``bn_before_relu``, through a subclass made on the fly.

Their ``feats``: entry 0 is a stem at the coarsest resolution that comes before the first stage (patch embedding,
stem convolution), the rest the last map of each resolution; of networks with one resolution (ViT) the stem and
four evenly spaced blocks. Token sequences and channels-last maps become (N, C, H, W), class tokens dropped.
``preacts`` is None: where a last ReLU is, if there is one, no library tells.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import SqueezeNet, SwinTransformer, VisionTransformer
from torchvision.ops import Permute

from d2distill.common.errors import did_you_mean
from d2distill.common.outputs import Outputs

from .base import on_vectors
from .published_weights import AUXILIARY, adapt_timm, adapt_torchvision, find_timm_filter

ImageSize = int | tuple[int, int] | None
# Norms are left out as the map before one is the block's own; the rest makes no maps.
_NOT_BLOCKS = (nn.BatchNorm2d, nn.LayerNorm, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Flatten, nn.Linear, Permute)
_HEADS = ("classifier", "fc", "head", "heads")
# torchvision's own recipes do not let them decay (--transformer-embedding-decay 0).
_EMBEDDINGS = ("class_token", "pos_embedding", "relative_position_bias_table")


class LibraryModel:
    """Mixin that goes in front of a library's class.

    Attributes:
        classifiers: names of the layers that make the logits; several in distilled transformers, none without classes.
    """

    bn_before_relu = None
    classifiers: list[str]

    @property
    def classifier_layer(self) -> nn.Module | None:
        """As :attr:`.base.FeatureClassifier.classifier_layer`; None where no single layer makes the logits.

        Not ``classifier``: many networks have a layer of that name, which need not be the last one.
        """
        # SqueezeNet's classifies every position before the pooling.
        single = len(self.classifiers) == 1 and not isinstance(self, SqueezeNet)
        return on_vectors(self.get_submodule(self.classifiers[0])) if single else None

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


@contextmanager
def _hooked(model: nn.Module, hooks: list[tuple[nn.Module, Callable]]) -> Iterator[list[Tensor]]:
    """Forward hooks that live as long as the block; gives what enters the classifiers meanwhile, as (N, D)."""
    pooled: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        # A convolution may classify every position and average afterwards (SqueezeNet).
        pooled.append(x.mean(dim=(2, 3)) if x.ndim == 4 else x.flatten(1))

    hooks = [*((model.get_submodule(name), keep) for name in model.classifiers), *hooks]
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield pooled
    finally:
        for handle in handles:
            handle.remove()


def _merge(pooled: list[Tensor]) -> Tensor:
    """Two heads on tokens of the same width (distilled transformers) are averaged, as their logits are."""
    if len(pooled) == 1:
        return pooled[0]
    same = len({x.shape for x in pooled}) == 1
    return torch.stack(pooled).mean(0) if same else torch.cat(pooled, dim=1)


def tokens_to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, L, C) to (N, C, height, width); class tokens and the like come before the grid and are dropped."""
    return tokens[:, tokens.shape[1] - height * width :].transpose(1, 2).unflatten(2, (height, width))


def _evenly_spaced(count: int) -> list[int]:
    """Four of ``range(count)``, the last one included: 12 gives 2, 5, 8, 11."""
    wanted = min(count, 4)
    return [(i + 1) * count // wanted - 1 for i in range(wanted)]


def last_classifier(model: nn.Module, num_classes: int) -> str:
    """Name of the last linear layer (else convolution) with ``num_classes`` outputs."""
    for kind in (nn.Linear, nn.Conv2d):
        # Weights begin with the outputs in both.
        found = [n for n, m in model.named_modules() if isinstance(m, kind) and len(m.weight) == num_classes]
        if found:
            break
    return found[-1]


# ---- torchvision


class _Torchvision(LibraryModel):
    def adapt_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict, named and shaped as this network: :func:`.published_weights.adapt_torchvision`."""
        return adapt_torchvision(self, state)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimizer for transformers does not let decay, as timm's models name them."""
        return {name for name, _ in self.named_parameters() if name.endswith(_EMBEDDINGS)}


class TorchvisionModel(_Torchvision):
    """torchvision's model with ``outputs``; ``feats`` are the last block's output at each resolution."""

    def outputs(self, images: Tensor) -> Outputs:
        maps: list[Tensor] = []

        def record(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if output.ndim == 4:
                channels_last = isinstance(self, SwinTransformer) and not isinstance(module, nn.Conv2d)
                maps.append(output.permute(0, 3, 1, 2) if channels_last else output)

        with _hooked(self, [(block, record) for block in _blocks(self)]) as pooled:
            logits = self.forward(images)
        levels = maps[:1]
        for x in maps[1:]:
            # Convolutions without padding lose a row or two (Inception); only a halved area is a new resolution.
            if 2 * x.shape[2:].numel() > levels[-1].shape[2:].numel():
                levels.pop()
            levels.append(x)
        # Where the first map is already a quarter's, the stem has an entry of its own.
        patchify = images.shape[2:].numel() >= 12 * maps[0].shape[2:].numel() and maps[0] is not levels[0]
        return Outputs(logits, [maps[0], *levels] if patchify else levels, None, _merge(pooled))


class TorchvisionViT(_Torchvision):
    """torchvision's ViT with ``outputs``; ``feats`` are the patch embedding and four evenly spaced blocks."""

    def outputs(self, images: Tensor) -> Outputs:
        feats: list[Tensor] = []

        def record(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            feats.append(output if output.ndim == 4 else tokens_to_map(output, *feats[0].shape[2:]))

        layers = self.encoder.layers
        chosen = [self.conv_proj, *(layers[i] for i in _evenly_spaced(len(layers)))]
        with _hooked(self, [(module, record) for module in chosen]) as pooled:
            logits = self.forward(images)
        return Outputs(logits, feats, None, _merge(pooled))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Modules whose outputs are looked at. Only plain containers are opened: their subclasses are blocks."""
    for name, child in module.named_children():
        if name in _HEADS:
            continue
        if type(child) in (nn.Sequential, nn.ModuleList):
            yield from _blocks(child)
        elif not isinstance(child, _NOT_BLOCKS):
            yield child


def build_torchvision(name: str, num_classes: int, image_size: ImageSize = None) -> nn.Module:
    """``torchvision.models.get_model(name, weights=None, num_classes=...)`` with ``outputs``.

    ``image_size`` goes to ViT (a side only) and MaxViT, which have a fixed one; the others ignore it. GoogLeNet and
    Inception-v3 are built without auxiliary heads, whose weights in a checkpoint are skipped.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"torchvision {torchvision.__version__} has no classifier {name!r}{did_you_mean(name, known)}")
    options = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif image_size is not None and name.startswith("maxvit"):
        options = {"input_size": (image_size, image_size) if isinstance(image_size, int) else image_size}
    elif image_size is not None and name.startswith("vit_"):
        options = {"image_size": image_size}
    model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    if "aux_logits" in options:
        model.register_load_state_dict_pre_hook(_drop_auxiliary_heads)
    mixin = TorchvisionViT if isinstance(model, VisionTransformer) else TorchvisionModel
    model.__class__ = _subclass(mixin, type(model))
    model.classifiers = [last_classifier(model, num_classes)]
    return model


def _drop_auxiliary_heads(module: nn.Module, state_dict: dict[str, Tensor], *_) -> None:
    for key in [key for key in state_dict if key.startswith(AUXILIARY)]:
        del state_dict[key]


# ---- timm


class TimmModel(LibraryModel):
    """timm's model with ``outputs``; ``feats`` are the stem, if timm's maps have none, and `feat_indices` of them."""

    feat_indices: list[int] | None
    stem_name: str | None
    checkpoint_filter: Callable | None

    def adapt_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict, named and shaped as this network: :func:`.published_weights.adapt_timm`."""
        return adapt_timm(self, state, self.checkpoint_filter)

    def outputs(self, images: Tensor) -> Outputs:
        stem: list[Tensor] = []

        def record(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            # Some patch embeddings return their grid's size beside the tokens.
            stem.append(output[0] if isinstance(output, tuple) else output)

        with _hooked(self, [(self.get_submodule(self.stem_name), record)] if self.stem_name else []) as pooled:
            last, feats = self.forward_intermediates(images, indices=self.feat_indices, output_fmt="NCHW")
            head = self.forward_head(last)
        stem_map = self._stem_map(stem[0], feats[0].shape[2:]) if stem else None
        feats = feats if stem_map is None else [stem_map, *feats]
        # Without classes timm's head ends with the pooled vector.
        return Outputs(head, feats, None, _merge(pooled)) if self.classifiers else Outputs(None, feats, None, head)

    def _stem_map(self, x: Tensor, size: torch.Size) -> Tensor | None:
        """The stem's output as (N, C, H, W), the grid being `size`; None where it is no map."""
        if not torch.is_tensor(x):
            return None
        if x.ndim == 3:
            return tokens_to_map(x, *size) if x.shape[1] >= size.numel() else None
        # Not every patch embedding says that it is channels-last; then the shapes must.
        layout = getattr(self.get_submodule(self.stem_name), "output_fmt", None)
        if layout == "NHWC" or x.shape[1:3] == size != x.shape[2:]:
            return x.permute(0, 3, 1, 2)
        return x


def build_timm(name: str, num_classes: int, image_size: ImageSize = None) -> nn.Module:
    """``timm.create_model(name, num_classes=..., pretrained=False)`` with ``outputs``; 0 classes: no classifier.

    ``image_size`` becomes ``img_size`` for the models that take one (ViT, Swin ...); the others ignore it.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"'timm:{name}' needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{did_you_mean(name, timm.list_models())}")
    try:
        model = timm.create_model(name, num_classes=num_classes, **({"img_size": image_size} if image_size else {}))
    except TypeError as error:
        # timm keeps no list of the models that take img_size; those that do not refuse it so.
        if "img_size" not in str(error):
            raise
        model = timm.create_model(name, num_classes=num_classes)
    model.__class__ = _subclass(TimmModel, type(model))
    model.checkpoint_filter = find_timm_filter(name)
    model.classifiers = _timm_classifiers(model, num_classes) if num_classes else []
    infos = model.feature_info if isinstance(model.feature_info, list) else model.feature_info.info
    reductions = [info["reduction"] for info in infos]
    model.feat_indices = _levels(reductions)
    # CNNs with a map at half the resolution have their stem among the features already.
    stems = ("patch_embed", "stem") if reductions[0] >= 4 else ()
    children = dict(model.named_children())
    model.stem_name = next((n for n in stems if n in children and not isinstance(children[n], nn.ModuleList)), None)
    return model


def is_without_classes(name: str) -> bool:
    """Whether ``timm:NAME`` is published without a classifier, as networks trained without labels are (DINO, MAE)."""
    library, _, model = name.partition(":")
    if library != "timm" or find_spec("timm") is None:
        return False
    import timm

    published = timm.get_pretrained_cfg(model, allow_unregistered=True)
    return published is not None and published.num_classes == 0


def _timm_classifiers(model: nn.Module, num_classes: int) -> list[str]:
    heads = model.get_classifier()
    names = {module: name for name, module in model.named_modules()}
    heads = heads if isinstance(heads, tuple | list | nn.ModuleList) else [heads]
    return [".".join(filter(None, (names[head], last_classifier(head, num_classes)))) for head in heads]


def _levels(reductions: list[int]) -> list[int] | None:
    """Indices of the maps to take; None is all of them, which timm's CNNs list one per resolution."""
    if len(reductions) <= 6:
        return None
    if len(set(reductions)) == 1:
        return _evenly_spaced(len(reductions))
    return sorted({reduction: i for i, reduction in enumerate(reductions)}.values())
