"""``timm:NAME``: the models of PyTorch Image Models, through timm's own feature interface."""

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from d2distill.common.errors import did_you_mean
from d2distill.common.outputs import Outputs

from .library import LibraryModel, PooledRecorder, adopt, evenly_spaced, hooked, last_classifier, tokens_to_map


class TimmModel(LibraryModel):
    """timm's model with ``outputs``; ``feats`` are those of ``forward_intermediates``."""

    feat_indices: list[int] | None
    stem_name: str | None

    def outputs(self, images: Tensor) -> Outputs:
        recorder = PooledRecorder(self)
        stem = _StemRecorder()
        stem_hooks = [] if self.stem_name is None else [(self.get_submodule(self.stem_name), stem)]
        with hooked(recorder.hooks + stem_hooks):
            last, feats = self.forward_intermediates(images, indices=self.feat_indices, output_fmt="NCHW")
            head = self.forward_head(last)
        # Without classes timm's head ends with the pooled vector.
        logits, pooled = (head, recorder.pooled()) if self.classifiers else (None, head)
        stem_map = stem.map(like=feats[0])
        return Outputs(logits, feats if stem_map is None else [stem_map, *feats], None, pooled)


class _StemRecorder:
    """Keeps a stem's output, whatever its layout."""

    def __init__(self):
        self.output = None
        self.layout = None

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        # Some patch embeddings return their grid's size beside the tokens.
        self.output = output[0] if isinstance(output, tuple) else output
        self.layout = getattr(module, "output_fmt", None)

    def map(self, like: Tensor) -> Tensor | None:
        """The output as (N, C, H, W), the grid being that of ``like``; None where it is no map."""
        size, x = tuple(like.shape[2:]), self.output
        if not torch.is_tensor(x):
            return None
        if x.ndim == 3:
            return tokens_to_map(x, *size) if x.shape[1] >= size[0] * size[1] else None
        # Not every patch embedding says that it is channels-last; then the shapes must.
        if self.layout == "NHWC" or (tuple(x.shape[1:3]) == size and tuple(x.shape[2:]) != size):
            return x.permute(0, 3, 1, 2)
        return x


def build_timm(name: str, num_classes: int, image_size: int | tuple[int, int] | None = None) -> nn.Module:
    """``timm.create_model(name, num_classes=..., pretrained=False)`` with ``outputs``; 0 classes: no classifier.

    ``image_size`` becomes ``img_size`` for the models that take one (ViT, Swin ...); the others ignore it.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm knows no such model.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"'timm:{name}' needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{did_you_mean(name, timm.list_models())}")
    model = _create(timm.create_model, name, num_classes, image_size)
    model = adopt(model, TimmModel, _classifiers(model, num_classes))
    infos = list(model.feature_info if isinstance(model.feature_info, list) else model.feature_info.info)
    model.feat_indices = _levels([info["reduction"] for info in infos])
    model.stem_name = _stem_name(model, infos[0]["reduction"])
    return model


def is_without_classes(name: str) -> bool:
    """Whether ``timm:NAME`` is published without a classifier, as networks trained without labels are (DINO, MAE)."""
    library, _, model = name.partition(":")
    if library != "timm" or find_spec("timm") is None:
        return False
    import timm

    published = timm.get_pretrained_cfg(model, allow_unregistered=True)
    return published is not None and published.num_classes == 0


def _create(create, name: str, num_classes: int, image_size: int | tuple[int, int] | None) -> nn.Module:
    if image_size is not None:
        try:
            return create(name, pretrained=False, num_classes=num_classes, img_size=image_size)
        except TypeError as error:
            # timm keeps no list of the models that take img_size; those that do not refuse it so.
            if "img_size" not in str(error):
                raise
    return create(name, pretrained=False, num_classes=num_classes)


def _classifiers(model: nn.Module, num_classes: int) -> list[str]:
    if num_classes == 0:
        return []
    heads = model.get_classifier()
    names = {module: name for name, module in model.named_modules()}
    found = []
    for head in heads if isinstance(heads, tuple | list | nn.ModuleList) else [heads]:
        inner = last_classifier(head, num_classes)
        found.append(".".join(part for part in (names[head], inner) if part))
    return found


def _levels(reductions: list[int]) -> list[int] | None:
    """Indices of the maps to take; None is all of them, which timm's CNNs list one per resolution."""
    if len(reductions) <= 6:
        return None
    if len(set(reductions)) == 1:
        return evenly_spaced(len(reductions))
    return sorted({reduction: i for i, reduction in enumerate(reductions)}.values())


def _stem_name(model: nn.Module, first_reduction: int) -> str | None:
    # CNNs with a map at half the resolution have their stem among the features already.
    if first_reduction < 4:
        return None
    children = dict(model.named_children())
    return next(
        (n for n in ("patch_embed", "stem") if n in children and not isinstance(children[n], nn.ModuleList)), None
    )
