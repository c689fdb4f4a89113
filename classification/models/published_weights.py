"""Published weights of timm's and torchvision's classifiers: other names, image sizes, auxiliary heads.

The libraries change these themselves when they download weights; here a file may come from anywhere.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

#: Heads for training alone, of Inception-v3 and GoogLeNet.
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
# Names in torchvision's own published files that it renames while loading: DenseNet's, the vision transformer's.
_OLD_NAMES = {
    r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.": r"\1\2.",
    r"\.mlp\.linear_1\.": ".mlp.0.",
    r"\.mlp\.linear_2\.": ".mlp.3.",
}
_Filter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


def adapt_torchvision(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Today's names, no auxiliary heads, and a vision transformer's positions for the images of `model`."""
    state = _without_auxiliary(model, state)
    for old, new in _OLD_NAMES.items():
        state = {re.sub(old, new, name): value for name, value in state.items()}
    if isinstance(model, VisionTransformer) and "encoder.pos_embedding" in state:
        try:
            return interpolate_embeddings(model.image_size, model.patch_size, state)
        except ValueError:  # positions of images that are not square: the shapes tell
            pass
    return state


def find_timm_filter(name: str) -> _Filter | None:
    """The function by which timm turns published weights into those of its model `name`, if it has a public one."""
    import timm

    found = getattr(sys.modules[timm.model_entrypoint(name).__module__], "checkpoint_filter_fn", None)
    if found is not None and "adapt_layer_scale" in inspect.signature(found).parameters:
        # It then renames DeiT III's layer scales too; no other vision transformer has such names.
        return functools.partial(found, adapt_layer_scale=True)
    return found


def adapt_timm(model: nn.Module, state: Mapping[str, Tensor], convert: _Filter | None) -> dict[str, Tensor]:
    """No auxiliary heads, then timm's own filter `convert`: old and the authors' names, positions for other images."""
    state = _without_auxiliary(model, state)
    try:
        return state if convert is None else convert(dict(state), model)
    except Exception:  # on a file of another network the filters raise nearly anything
        return state


def _without_auxiliary(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = model.state_dict()
    return {name: value for name, value in state.items() if name in own or not name.startswith(AUXILIARY)}
