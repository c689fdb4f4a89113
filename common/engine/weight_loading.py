"""Load weights into a network that may have other classes, or say why they do not fit."""

import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from d2distill.common.engine.weight_files import Mismatch, compare_states, first_few, read_weights
from d2distill.common.errors import CheckpointError

__all__ = ["class_count", "load_state", "load_weights", "weights_for"]

logger = logging.getLogger("detectron2.d2distill")


def load_weights(model: nn.Module, source: str, key: str, use_ema: bool = True) -> None:
    """Load a network's weights from a `source` as of :func:`.read_weights`. Every name and shape must fit.

    Raises:
        CheckpointError: as :func:`weights_for` and :func:`load_state`.
    """
    load_state(model, weights_for(model, source, key, use_ema), source, key)


def weights_for(model: nn.Module, source: str, key: str, use_ema: bool = True) -> dict[str, Tensor]:
    """Read weights, named and shaped as `model`'s as far as its ``adapt_state_dict(state)``, if it has one, can.

    What fits as it is is not adapted; the classes stay the file's.

    Raises:
        CheckpointError: as :func:`.read_weights`; it begins with `key`, the config key or flag that named the file.
    """
    own = model.state_dict()
    try:
        weights = read_weights(source, own.keys(), use_ema)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    if not any(compare_states(own, weights)) or not hasattr(model, "adapt_state_dict"):
        return weights
    adapted = model.adapt_state_dict(weights)
    resized = compare_states(adapted, weights).shapes.items()
    changes = {
        "resized": [f"{name} {old} to {new}" for name, (old, new) in resized],
        "dropped or renamed": [name for name in weights if name not in adapted],
        "under new names": [name for name in adapted if name not in weights],
    }
    if any(changes.values()):
        texts = [f"{len(names)} {done} ({first_few(names)})" for done, names in changes.items() if names]
        logger.info(f"{key}: {source} is adapted to the network: {'; '.join(texts)}")
    return adapted


def load_state(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, key: str, fresh: Sequence[str] = ()
) -> None:
    """Load what :func:`weights_for` returned.

    Args:
        source, key: where the weights are from, for errors and the log.
        fresh: the classifier's layers. They stay as they are where the weights are of other classes or have none.

    Raises:
        CheckpointError: the weights are of another network, image size or number of classes.
    """
    own = model.state_dict()
    found = compare_states(own, weights)
    body = _without_classifier(own, weights, found, fresh)
    if body is not None:
        theirs, here = (_num_outputs(state, fresh) for state in (weights, own))
        logger.info(
            f"{key}: {source} has {f'{theirs} classes' if theirs else 'no classifier'}, here are {here} classes: the "
            f"classifier ({', '.join(fresh)}) stays fresh, everything else is loaded"
        )
        weights = body
    elif any(found):
        raise CheckpointError(f"{key}: {source} {_explain(model, own, weights, found)}")
    model.load_state_dict(weights, strict=False)


def class_count(model: nn.Module, weights: Mapping[str, Tensor]) -> int | None:
    """Number of classes of `weights` for `model`, from the layers in ``model.classifiers``; 0: no classifier.

    None where it cannot be told: the weights are of another network, or the model does not name its classifier.
    """
    layers, own = getattr(model, "classifiers", ()), model.state_dict()
    found = compare_states(own, weights)
    if not layers or (any(found) and _without_classifier(own, weights, found, layers) is None):
        return None
    return _num_outputs(weights, layers)


def _heads(state: Mapping[str, Tensor], layers: Sequence[str]) -> list[str]:
    return [name for name in state if name.startswith(tuple(f"{layer}." for layer in layers))]


def _num_outputs(state: Mapping[str, Tensor], layers: Sequence[str]) -> int:
    # Weights and biases begin with the outputs.
    return next((len(state[name]) for name in _heads(state, layers)), 0)


def _without_classifier(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], found: Mismatch, layers: Sequence[str]
) -> dict[str, Tensor] | None:
    """The weights but for the classifier `layers`, if only these are missing or of other classes; else None."""
    heads = set(_heads(own, layers))
    missing = heads.intersection(found.missing)
    resized = {name for name, (theirs, here) in found.shapes.items() if name in heads and theirs[1:] == here[1:]}
    others = {*found.missing, *found.unexpected, *found.shapes} - missing - resized
    if not heads or others or not (resized or missing == heads):
        return None
    return {name: value for name, value in weights.items() if name not in heads}


def _explain(model: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], found: Mismatch) -> str:
    """Explain why the weights of a file do not fit a network."""
    network = type(model).__name__
    if not own.keys() & weights.keys():
        prefixes = {"its": _common_prefix(weights, own), "the network's": _common_prefix(own, weights)}
        guess = next((f": {whose} names begin with {p}, the other's do not" for whose, p in prefixes.items() if p), "")
        return (
            f"has not one of the names of {network} here{guess}; it has {first_few(weights)}; the network has "
            f"{first_few(own)}"
        )
    what, hint = "network", ""
    if _without_classifier(own, weights, found, getattr(model, "classifiers", ())) is not None:
        what = "number of classes"
    elif not found.missing and not found.unexpected and all("pos" in name for name in found.shapes):
        what = "image size"
        grids = [_patch_grid(shape) for shape in next(iter(found.shapes.values()))]
        hint = f" (positions of {grids[0]} x {grids[0]} patches, here {grids[1]} x {grids[1]})" if all(grids) else ""
    fitting = len(own.keys() & weights.keys() - found.shapes.keys())
    return f"is of another {what} than {network} here{hint}: {found}; {fitting} of {len(own)} tensors fit"


def _common_prefix(names: Collection[str], others: Collection[str]) -> str:
    """What stands in front of names that without it are most of `others`; empty if nothing does."""
    starts = [(name, at + 1) for name in names for at, letter in enumerate(name) if letter == "."]
    found = Counter(name[:start] for name, start in starts if name[start:] in others)
    return next((prefix for prefix, count in found.most_common(1) if 2 * count > len(others)), "")


def _patch_grid(shape: tuple[int, ...]) -> int | None:
    """Side of the grid of a table of positions (1, L, D), which may begin with one or two other tokens."""
    tokens = shape[1] if len(shape) == 3 else 0
    return next((math.isqrt(n) for n in (tokens - 1, tokens, tokens - 2) if n > 0 and math.isqrt(n) ** 2 == n), None)
