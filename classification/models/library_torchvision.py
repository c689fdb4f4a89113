"""``torchvision:NAME``: torchvision's classifiers, looked into with forward hooks."""

import math
from collections.abc import Iterator

import torchvision
from torch import Tensor, nn
from torchvision.models import SqueezeNet, SwinTransformer, VisionTransformer
from torchvision.ops import Permute

from d2distill.common.errors import did_you_mean
from d2distill.common.outputs import Outputs

from .library import LibraryModel, PooledRecorder, adopt, evenly_spaced, hooked, last_classifier, tokens_to_map

# Norms are left out as the map before one is the block's own; the rest makes no maps.
_NOT_BLOCKS = (nn.BatchNorm2d, nn.LayerNorm, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Flatten, nn.Linear, Permute)
_HEADS = ("classifier", "fc", "head", "heads")
# Learned, but no matrices: torchvision's own recipes do not let them decay (--transformer-embedding-decay 0).
_EMBEDDINGS = ("class_token", "pos_embedding", "relative_position_bias_table")
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


class _Torchvision(LibraryModel):
    @property
    def classifier_layer(self) -> nn.Module | None:
        # SqueezeNet's classifies every position before the pooling.
        return None if isinstance(self, SqueezeNet) else super().classifier_layer

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimizer for transformers does not let decay, as timm's models name them."""
        return {name for name, _ in self.named_parameters() if name.endswith(_EMBEDDINGS)}


class TorchvisionModel(_Torchvision):
    """torchvision's model with ``outputs``; ``feats`` are the last block's output at each resolution."""

    def outputs(self, images: Tensor) -> Outputs:
        pooled = PooledRecorder(self)
        levels = _LevelRecorder(images, channels_last=isinstance(self, SwinTransformer))
        with hooked(pooled.hooks + [(block, levels) for block in _blocks(self)]):
            logits = self.forward(images)
        return Outputs(logits, levels.feats(), None, pooled.pooled())


class TorchvisionViT(_Torchvision):
    """torchvision's ViT with ``outputs``; ``feats`` are the patch embedding and four evenly spaced blocks."""

    def outputs(self, images: Tensor) -> Outputs:
        pooled = PooledRecorder(self)
        feats: list[Tensor] = []

        def record(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            feats.append(output if output.ndim == 4 else tokens_to_map(output, *feats[0].shape[2:]))

        layers = self.encoder.layers
        chosen = [self.conv_proj, *(layers[i] for i in evenly_spaced(len(layers)))]
        with hooked(pooled.hooks + [(module, record) for module in chosen]):
            logits = self.forward(images)
        return Outputs(logits, feats, None, pooled.pooled())


class _LevelRecorder:
    """Keeps the last map of each resolution and, where the first one is already a quarter's, a map of the stem."""

    def __init__(self, images: Tensor, channels_last: bool):
        self.image_area = math.prod(images.shape[2:])
        self.channels_last = channels_last
        self.stem: Tensor | None = None
        self.levels: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if output.ndim != 4:
            return
        if self.channels_last and not isinstance(module, nn.Conv2d):
            output = output.permute(0, 3, 1, 2)
        area = math.prod(output.shape[2:])
        if self.stem is None:
            self.stem = output
        # Convolutions without padding lose a row or two (Inception); only a halved area is a new resolution.
        if self.levels and 2 * area > math.prod(self.levels[-1].shape[2:]):
            self.levels[-1] = output
        else:
            self.levels.append(output)

    def feats(self) -> list[Tensor]:
        patchify = self.image_area >= 12 * math.prod(self.stem.shape[2:])
        return [self.stem, *self.levels] if patchify and self.stem is not self.levels[0] else self.levels


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Modules whose outputs are looked at. Only plain containers are opened: their subclasses are blocks."""
    for name, child in module.named_children():
        if name in _HEADS:
            continue
        if type(child) in (nn.Sequential, nn.ModuleList):
            yield from _blocks(child)
        elif not isinstance(child, _NOT_BLOCKS):
            yield child


def build_torchvision(name: str, num_classes: int, image_size: int | tuple[int, int] | None = None) -> nn.Module:
    """``torchvision.models.get_model(name, weights=None, num_classes=...)`` with ``outputs``.

    ``image_size`` goes to ViT (a side only) and MaxViT, which have a fixed one; the others ignore it. GoogLeNet and
    Inception-v3 are built without auxiliary heads, whose weights in a checkpoint are skipped; for torchvision's own
    weights of these two set the pixel mean and standard deviation to 127.5, as their ``transform_input`` would.

    Raises:
        ValueError: torchvision knows no such classifier.
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
    return adopt(model, mixin, [last_classifier(model, num_classes)])


def _drop_auxiliary_heads(module: nn.Module, state_dict: dict[str, Tensor], *_) -> None:
    for key in [key for key in state_dict if key.startswith(_AUXILIARY)]:
        del state_dict[key]
