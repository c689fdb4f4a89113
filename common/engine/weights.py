"""Reading weights that others wrote: the one place that opens foreign files."""

import argparse
import os
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import CheckpointError

__all__ = ["load_weights", "read_weights"]

# What public checkpoints hold beside tensors: RepDistiller's options, numpy accuracies. None of them runs code.
_HARMLESS = [argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i8"))]
_HARMLESS += [(np.float64(0).__reduce__()[0], name + ".multiarray.scalar") for name in ("numpy.core", "numpy._core")]


def read_weights(source: str) -> dict[str, Tensor]:
    """Read a state dict.

    Args:
        source: a path or URL of a ``.pth`` (also ``{"model": ...}``, ``{"state_dict": ...}``, with or without
            ``module.``, or a run's own checkpoint, of which the student is taken) or ``.safetensors`` file;
            ``torchvision:ResNet34_Weights.IMAGENET1K_V1``; or ``timm:NAME``.

    Raises:
        CheckpointError: missing, unreachable, damaged, or holding anything but weights.
    """
    library, _, name = source.partition(":")
    if library in ("torchvision", "timm"):
        return _read_library(library, name)
    path = _local_path(source)
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        lines = [line.split("WeightsUnpickler error:")[-1].strip() for line in str(error).splitlines()]
        reason = next((line for line in lines if "nsupported" in line), lines[0])
        raise CheckpointError(f"{source} is refused, for it holds more than weights: {reason}") from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be read as a checkpoint: {_last_line(error)}") from error
    return _state_dict(content, source)


def load_weights(model: nn.Module, source: str, key: str) -> None:
    """Load `source` into `model`, every name and shape equal.

    Args:
        model: the network.
        source: as in :func:`read_weights`.
        key: the setting or flag that named the file, for the error.

    Raises:
        CheckpointError: as :func:`read_weights`; or the file is of another network or class count.
    """
    try:
        weights = read_weights(source)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    # Checkpoints from before torch 0.4.1 have no step counters in their batch norms.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    shapes = {n: (tuple(weights[n].shape), tuple(t.shape)) for n, t in own.items() if n in weights}
    wrong = [f"{n} {theirs} instead of {mine}" for n, (theirs, mine) in shapes.items() if theirs != mine]
    if not (missing or unexpected or wrong):
        model.load_state_dict(weights, strict=False)
        return
    heads = [pair for pair in shapes.values() if pair[0] != pair[1]]
    if not (missing or unexpected) and all(a[1:] == b[1:] for a, b in heads) and len({a[0] for a, _ in heads}) == 1:
        raise CheckpointError(
            f"{key}: {source} has {heads[0][0][0]} classes, but the network is built for {heads[0][1][0]}; "
            "use the checkpoint of the same data set, or set MODEL.NUM_CLASSES"
        )
    facts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    raise CheckpointError(f"{key}: {source} is of another network than {type(model).__name__}: {'; '.join(facts)}")


def _read_library(library: str, name: str) -> dict[str, Tensor]:
    try:
        if library == "torchvision":
            from torchvision.models import get_weight

            return get_weight(name).get_state_dict(progress=True, check_hash=True)
        import timm

        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # whatever a hub client raises when a name is wrong or the network is closed
        raise CheckpointError(f"the weights {library}:{name} cannot be had: {_last_line(error)}") from error


def _local_path(source: str) -> str:
    from detectron2.utils.file_io import PathManager

    if "://" not in source and not os.path.isfile(source):
        raise CheckpointError(
            f"there is no checkpoint at {os.path.abspath(source)}; README.md, 'Teachers', says where published ones "
            "are and how to train one"
        )
    try:
        return PathManager.get_local_path(source)
    except Exception as error:  # whatever the handler of the URL raises
        raise CheckpointError(f"{source} cannot be fetched: {_last_line(error)}") from error


def _state_dict(content: Any, source: str) -> dict[str, Tensor]:
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{source} holds no state dict, neither alone nor under 'model' or 'state_dict'")
    for prefix in ("module.", "student."):
        if any(name.startswith(prefix) for name in content):
            content = {n.removeprefix(prefix): v for n, v in content.items() if n.startswith(prefix)}
    return dict(content)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
