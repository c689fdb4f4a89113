"""Read files of weights that others wrote, without running code from them."""

import argparse
import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from d2distill.common.engine.safe_pickle import load_arrays
from d2distill.common.errors import CheckpointError

#: The entry, beside the weights, in which students of this package have what is needed to use them, as JSON.
DESCRIPTION = "d2distill"
logger = logging.getLogger("detectron2.d2distill")

#: Prefixes of sources that are no files: ``torchvision:WEIGHTS`` and ``timm:NAME``.
LIBRARIES = ("torchvision", "timm")

# How files of torch.save begin, today's and those from before torch 1.6, whatever their suffix.
_TORCH_FILES = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")

# Entries in which public checkpoints keep their state dict ("state" is Composer's, around "model"), and those for its
# average over the training; prefixes of torch's wrappers and of this package's runs; usual ones of Lightning's modules,
# which may as well be a network's own.
_ENTRIES = ("model", "state_dict", "model_state_dict", "net", "model_state", "weights", "params", "state")
_AVERAGED = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema")
_PREFIXES = ("module.", "_orig_mod.", "student.")
_PREFIXES_OF_MODULES = ("model.", "net.", "network.")

# Types in public checkpoints beside tensors: RepDistiller's options, numpy accuracies. None of them runs code.
_HARMLESS = [argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i8"))]
_HARMLESS += [(np.float64(0).__reduce__()[0], name + ".multiarray.scalar") for name in ("numpy.core", "numpy._core")]


class Mismatch(NamedTuple):
    """How the tensors of a file differ from a network's: names that only one of them has, and other shapes."""

    missing: list[str]
    unexpected: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # the file's and the network's

    def __str__(self) -> str:
        """Text "2 missing (a, b); 1 of another shape (c (3,) instead of (4,))"; empty where nothing differs."""
        wrong = [f"{name} {theirs} instead of {own}" for name, (theirs, own) in self.shapes.items()]
        return "; ".join(
            f"{len(names)} {what} ({first_few(names)})"
            for what, names in (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", wrong))
            if names
        )


def first_few(names: Iterable[str]) -> str:
    """Text "a, b, c, ..." for messages."""
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def compare_states(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Mismatch:
    """Compare the state dict of a file with a network's own one.

    Step counters are ignored: frozen batch norms have none, and neither have files from before torch 0.4.1.
    """
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in state if n not in own and not n.endswith("num_batches_tracked")]
    shapes = {n: (tuple(state[n].shape), tuple(t.shape)) for n, t in own.items() if n in state}
    return Mismatch(missing, unexpected, {n: pair for n, pair in shapes.items() if pair[0] != pair[1]})


def read_weights(source: str, names: Collection[str] = (), use_ema: bool | None = None) -> dict[str, Tensor]:
    """Read a state dict.

    Args:
        source: a path or URL of a ``.pth`` file (a state dict alone or under an entry such as ``"model"``, with or
            without prefixes such as ``module.``; of a run's own checkpoint the student is read) or ``.safetensors``
            file; ``torchvision:ResNet34_Weights.IMAGENET1K_V1``; or ``timm:NAME``.
        names: of the network's tensors, where they are known: then also Lightning's usual prefixes are removed, and no
            more than is needed to find one of these names.
        use_ema: which to take of a file that holds weights and their average over the training. None: the weights,
            there being no setting for it.

    Raises:
        CheckpointError: missing, unreachable, damaged, with other content than weights, or not finite.
    """
    return state_dict_of(read_content(source), source, names, use_ema)


def state_dict_of(
    content: Any, source: str, names: Collection[str] = (), use_ema: bool | None = None
) -> dict[str, Tensor]:
    """The state dict in what :func:`read_content` returned for `source`, without wrappers' prefixes."""
    state = _find_state(content, source, use_ema)
    if state is None:
        has = f"; it has {first_few(map(str, content))}" if isinstance(content, Mapping) and content else ""
        entries = ", ".join(map(repr, (*_ENTRIES, *_AVERAGED)))
        raise CheckpointError(f"{source} holds no state dict, neither alone nor under one of {entries}{has}")
    prefixes = (*_PREFIXES, *_PREFIXES_OF_MODULES) if names else _PREFIXES
    # Wrappers may be nested in any order. A network may have a child whose name is a wrapper's.
    while not any(name in names for name in state) and (
        prefix := next((p for p in prefixes if any(name.startswith(p) for name in state)), None)
    ):
        if others := [name for name in state if not name.startswith(prefix)]:
            logger.info(f"{source}: the network's entries begin with {prefix}; passed over: {first_few(others)}")
        state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    check_finite(state, source)
    return dict(state)


def _find_state(content: Any, source: str, use_ema: bool | None) -> Mapping[str, Tensor] | None:
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(value, Tensor) for value in content.values()):
        return content
    found = {entry: _find_state(content.get(entry), source, use_ema) for entry in (*_ENTRIES, *_AVERAGED)}
    live, averaged = (next((e for e in kind if found[e] is not None), None) for kind in (_ENTRIES, _AVERAGED))
    taken, other = (averaged, live) if averaged and (use_ema or not live) else (live, averaged)
    if taken and other:
        how = "" if use_ema is None else f"; USE_EMA {not use_ema} takes {other}"
        logger.info(
            f"{source} has weights ({live}) and their average over the training ({averaged}): {taken} is read{how}"
        )
    return found.get(taken)


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise a CheckpointError that names `source` and the first tensor of `state` that has a NaN or an infinity."""
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(f"{source} is not finite: {name} has NaN or infinite values")


def read_content(source: str) -> Any:
    """Read all of a file, also what is not weights, without running code from it.

    Args:
        source: as in :func:`read_weights`, with the same errors; also a ``.pkl`` of Detectron2's model zoo or Caffe2.

    Returns:
        What was saved, with tensors on the CPU; arrays and numbers of a pickle are tensors, its Nones are left out.
        Weights of a library are ``{"model": ..., "__author__": library}``, a ``.safetensors`` file is
        ``{"model": ..., **metadata}``.
    """
    library, _, name = source.partition(":")
    if library in LIBRARIES:
        return {"model": _read_library(library, name), "__author__": library}
    path = _local_path(source)
    with open(path, "rb") as file:
        start = file.read(16)
    try:
        if path.endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                return {**(file.metadata() or {}), "model": {n: file.get_tensor(n) for n in file.keys()}}  # noqa: SIM118
        if start.startswith(_TORCH_FILES):
            return read_torch(path)
        if path.endswith(".pkl") or start.startswith(b"\x80"):
            return _tensors(load_arrays(path, CheckpointError))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            # Torch proposes to trust the file.
            raise CheckpointError(
                f"{source} is refused, for it holds more than weights: a pickled {found[1]}, which might run code; "
                "save the network's model.state_dict() alone"
            ) from error
        raise CheckpointError(f"{source} cannot be read as a checkpoint: {_last_line(error)}") from error
    raise CheckpointError(
        f"{source} is no checkpoint: it does not begin like one (is it a text, a web page, a Git LFS pointer?)"
    )


def _read_library(library: str, name: str) -> dict[str, Tensor]:
    try:
        if library == "torchvision":
            from torchvision.models import get_weight

            return get_weight(name).get_state_dict(progress=True, check_hash=True)
        import timm

        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # unknown names and closed networks raise whatever the hub's client likes
        raise CheckpointError(f"cannot load the weights {library}:{name}: {_last_line(error)}") from error


def _local_path(source: str) -> str:
    from detectron2.utils.file_io import PathManager

    path = source if "://" in source else os.path.abspath(os.path.expanduser(source))
    if "://" not in path and not os.path.isfile(path):
        raise CheckpointError(
            f"there is no checkpoint at {path}; docs/classification.md, 'Teachers', says where to get published ones "
            "and how to train one"
        )
    try:
        return PathManager.get_local_path(path)
    except Exception as error:  # whatever the handler of the URL raises
        raise CheckpointError(f"{source} cannot be fetched: {_last_line(error)}") from error


def read_torch(path: str | Path) -> Any:
    """Read a file of torch.save onto the CPU. torch.load does not check the archive's checksums, and bits may flip."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise RuntimeError(f"wrong checksum of {damaged}")
    with torch.serialization.safe_globals(_HARMLESS):
        return torch.load(path, map_location="cpu", weights_only=True)


def _tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tensors(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, np.ndarray):
        # A copy in the machine's byte order: torch has no other.
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    return torch.tensor(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def read_description(source: str) -> dict[str, Any]:
    """What a run of d2distill wrote into a file of a student beside its weights; empty for every other file.

    Of a run's own checkpoint it has the ``classes`` alone.

    Files that cannot be read have none either: loading their weights will say why.
    """
    try:
        return description_in(read_content(source))
    except CheckpointError:
        return {}


def description_in(content: Any) -> dict[str, Any]:
    """The same of what :func:`read_content` returned."""
    if not isinstance(content, Mapping):
        return {}
    try:
        found = json.loads(content[DESCRIPTION]) if DESCRIPTION in content else _facts_of_run(content)
    except (TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _facts_of_run(content: Mapping[str, Any]) -> dict[str, Any]:
    identity = content.get("run_identity")
    return {"classes": identity["classes"]} if isinstance(identity, Mapping) and "classes" in identity else {}


def preprocess_in(description: Mapping[str, Any], *keys: str) -> tuple[Any, ...] | None:
    """These entries of a description's ``preprocess``; None where not all of them are there."""
    found = description.get("preprocess")
    return tuple(found[key] for key in keys) if isinstance(found, dict) and set(keys) <= found.keys() else None


def source_digest(source: str) -> dict[str, str]:
    """The name of a file of weights or annotations, without the folders of this machine, and its SHA-256."""
    if source.partition(":")[0] in LIBRARIES:
        return {"source": source}
    digest = hashlib.sha256()
    with open(_local_path(source), "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"source": os.path.basename(source), "sha256": digest.hexdigest()}


def weights_digest(network: nn.Module) -> str:
    """SHA-256 of a network's state dict: which weights it has, wherever they came from."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # Flat: in another memory format, axes of length 1 have strides of their own.
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy() if value.ndim else str(value.item()).encode())
    return digest.hexdigest()
