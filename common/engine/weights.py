"""Reading weights that others wrote: the one place that opens foreign files."""

import argparse
import hashlib
import os
import re
import zipfile
from collections.abc import Collection, Mapping
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2distill.common.engine.safe_pickle import load_arrays
from d2distill.common.errors import CheckpointError

__all__ = ["differences", "load_weights", "read_content", "read_weights", "state_dict_of", "weights_digest"]

# How files of torch.save begin, the present form and the one before torch 1.6, whatever their names end with.
_OF_TORCH = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")

# Where public checkpoints have their weights, and what torch's wrappers and a run of ours put before the names.
_ENTRIES = ("model", "state_dict", "model_state_dict", "net")
_PREFIXES = ("module.", "_orig_mod.", "student.")

# What public checkpoints hold beside tensors: RepDistiller's options, numpy accuracies. None of them runs code.
_HARMLESS = [argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i8"))]
_HARMLESS += [(np.float64(0).__reduce__()[0], name + ".multiarray.scalar") for name in ("numpy.core", "numpy._core")]


def read_weights(source: str) -> dict[str, Tensor]:
    """Read a state dict.

    Args:
        source: a path or URL of a ``.pth`` (alone or under an entry such as ``"model"``, with or without ``module.``
            and ``_orig_mod.``, or a run's own checkpoint, of which the student is taken) or ``.safetensors`` file;
            ``torchvision:ResNet34_Weights.IMAGENET1K_V1``; or ``timm:NAME``.

    Raises:
        CheckpointError: missing, unreachable, damaged, or holding anything but weights.
    """
    return state_dict_of(read_content(source), source)


def read_content(source: str) -> Any:
    """Read all that a file holds, what stands beside the weights too, without running any of it.

    Args:
        source: as in :func:`read_weights`; also a ``.pkl`` file of Detectron2's model zoo or of Caffe2.

    Returns:
        What was saved, with tensors on the CPU. The arrays and numbers of a ``.pkl`` have become tensors, and its
        Nones are left out. Weights of a library are ``{"model": ..., "__author__": library}``, a ``.safetensors``
        file is ``{"model": ..., **metadata}``.

    Raises:
        CheckpointError: missing, unreachable, damaged, or holding anything but plain containers and tensors.
    """
    library, _, name = source.partition(":")
    if library in ("torchvision", "timm"):
        return {"model": _read_library(library, name), "__author__": library}
    path = _local_path(source)
    try:
        if path.endswith(".safetensors"):
            return _read_safetensors(path)
        if path.endswith(".pkl") and not _is_of_torch(path):
            return _tensors(load_arrays(path, CheckpointError))
        # torch.load does not check the archive's checksums: flipped bits would become weights.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise CheckpointError(f"{source} cannot be read as a checkpoint: wrong checksum of {damaged}")
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise CheckpointError(f"{source} {_refusal(error, path)}") from error


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
            f"{key}: {source} has {heads[0][0][0]} classes, but the data set has {heads[0][1][0]}: either "
            "DATASETS.NAME or ROOT is wrong, or the checkpoint. One for this data set is the student_final.pth of a "
            "training of this network on it, for a teacher with DISTILL.METHODS []; the weights of torchvision: and "
            "timm: know ImageNet's classes only"
        )
    facts = differences(missing, unexpected, wrong)
    raise CheckpointError(f"{key}: {source} is of another network than {type(model).__name__}: {facts}")


def differences(missing: Collection[str], unexpected: Collection[str], wrong: Collection[str]) -> str:
    """Text "2 missing (a, b); 1 of another shape (c (3,) instead of (4,))"; empty where nothing differs."""
    facts = [
        f"{len(names)} {what} ({', '.join(list(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    return "; ".join(facts)


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

    if "://" not in source:
        source = os.path.expanduser(source)
        if os.path.isdir(source):
            raise CheckpointError(f"{os.path.abspath(source)} is a directory; name the checkpoint in it")
        if not os.path.isfile(source):
            raise CheckpointError(
                f"there is no checkpoint at {os.path.abspath(source)}; README.md, 'Teachers', says where published "
                "ones are and how to train one"
            )
    try:
        return PathManager.get_local_path(source)
    except Exception as error:  # whatever the handler of the URL raises
        raise CheckpointError(f"{source} cannot be fetched: {_last_line(error)}") from error


def state_dict_of(content: Any, source: str) -> dict[str, Tensor]:
    """The state dict in what :func:`read_content` returned for `source`, its names without wrappers' prefixes.

    Raises:
        CheckpointError: there is none.
    """
    for key in _ENTRIES:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        entries = ", ".join(map(repr, _ENTRIES))
        raise CheckpointError(f"{source} holds no state dict, neither alone nor under one of {entries}")
    # Wrappers are put around each other in any order.
    while prefix := next((p for p in _PREFIXES if any(name.startswith(p) for name in content)), None):
        content = {n.removeprefix(prefix): v for n, v in content.items() if n.startswith(prefix)}
    return dict(content)


def _refusal(error: Exception, path: str) -> str:
    """Why a file was not read, and what to do: never to trust it, as torch proposes."""
    if isinstance(error, OSError) or path.endswith(".safetensors"):
        return f"cannot be read as a checkpoint: {_last_line(error)}"
    with open(path, "rb") as file:
        is_pickle = file.read(1) == b"\x80"
    if not (is_pickle or _is_of_torch(path)):
        return "is no checkpoint: it does not begin like one (is it a text, a web page, a Git LFS pointer?)"
    if not isinstance(error, UnpicklingError):
        return f"cannot be read as a checkpoint: {_last_line(error)}"
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"is refused, for it holds more than weights: a pickled {found[1]}, which might run code; "
            "save the network's model.state_dict() alone"
        )
    return f"cannot be read as a checkpoint: {str(error).split('WeightsUnpickler error:')[-1].strip().splitlines()[0]}"


def _is_of_torch(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(16).startswith(_OF_TORCH)


def _read_safetensors(path: str) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {**(file.metadata() or {}), "model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118


def _tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tensors(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, np.ndarray):
        # A copy in the machine's byte order: torch has no other.
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    return torch.tensor(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def weights_digest(network: nn.Module) -> str:
    """SHA-256 of a network's state dict: which weights it has, wherever they came from."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy() if value.ndim else str(value.item()).encode()
        )
    return digest.hexdigest()
