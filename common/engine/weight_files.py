"""Read files of weights that others wrote, without running code from them."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from d2distill.common.engine.safe_pickle import RefusedGlobalError, load_arrays
from d2distill.common.engine.tensor_files import ARCHIVE, LEGACY, read_safetensors, read_torch_file, state_digest
from d2distill.common.errors import CheckpointError

#: The entry, beside the weights, in which students of this package have what is needed to use them, as JSON.
DESCRIPTION = "d2distill"
logger = logging.getLogger("detectron2.d2distill")

#: Prefixes of sources that are no files: ``torchvision:WEIGHTS`` and ``timm:NAME``.
LIBRARIES = ("torchvision", "timm")

# Entries in which public checkpoints keep their state dict ("state" is Composer's, around "model"), and those for its
# average over the training; prefixes of torch's wrappers and of this package's runs; usual ones of Lightning's modules,
# which may as well be a network's own.
_ENTRIES = ("model", "state_dict", "model_state_dict", "net", "model_state", "weights", "params", "state")
_AVERAGED = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema")
_MAX_DEPTH = 4
_PREFIXES = ("module.", "_orig_mod.", "student.")
_PREFIXES_OF_MODULES = ("model.", "net.", "network.")


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


def _find_state(content: Any, source: str, use_ema: bool | None, depth: int = 0) -> Mapping[str, Tensor] | None:
    # A file may nest one entry in itself.
    if not isinstance(content, Mapping) or not content or depth == _MAX_DEPTH:
        return None
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return content
    entries = (*_ENTRIES, *_AVERAGED)
    found = {entry: _find_state(content.get(entry), source, use_ema, depth + 1) for entry in entries}
    live, averaged = (next((e for e in kind if found[e] is not None), None) for kind in (_ENTRIES, _AVERAGED))
    taken, other = (averaged, live) if averaged and (use_ema or not live) else (live, averaged)
    if taken and other:
        how = "" if use_ema is None else f"; USE_EMA {not use_ema} takes {other}"
        logger.info(
            f"{source} has weights ({live}) and their average over the training ({averaged}): {taken} is read{how}"
        )
    return found.get(taken)


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise a CheckpointError that names `source` and the first tensor of `state` that has a NaN or an infinity.

    So has one of larger numbers than float32, the networks' type, can hold.
    """
    for name, value in state.items():
        if value.is_floating_point() and not value.float().isfinite().all():
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
    try:
        if path.endswith(".safetensors"):
            state, facts = read_safetensors(path)
            return {**facts, "model": state}
        with open(path, "rb") as file:
            start = file.read(16)
            if start.startswith((ARCHIVE, LEGACY)):
                return read_torch_file(file)[0]
        if path.endswith(".pkl") or start.startswith(b"\x80"):
            return _tensors(load_arrays(path, CheckpointError), {})
    except CheckpointError:
        raise
    except RefusedGlobalError as error:
        raise CheckpointError(
            f"{source} is refused, for it holds more than weights: a pickled {error.name}, which might run code; "
            "save the network's model.state_dict() alone"
        ) from error
    except Exception as error:  # a damaged file raises nearly anything
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


def _tensors(value: Any, done: dict[int, Any]) -> Any:
    """Arrays and numbers as tensors; each object once, however often it is in the file. `done` is by their id."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, dict):
        done[id(value)] = result = {}
        result.update((name, _tensors(entry, done)) for name, entry in value.items() if entry is not None)
        return result
    if isinstance(value, np.ndarray):
        # A copy in the machine's byte order: torch has no other.
        done[id(value)] = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
        return done[id(value)]
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


def preprocess_in(description: Mapping[str, Any], source: str, *keys: str) -> tuple[Any, ...] | None:
    """These entries of a description's ``preprocess``; None where not all of them are there.

    Raises:
        CheckpointError: one is of another kind than it should be; `source` is named.
    """
    found = description.get("preprocess")
    if not isinstance(found, dict) or not set(keys) <= found.keys():
        return None
    for key in keys:
        if not _KINDS[key](found[key]):
            raise CheckpointError(f"{source} describes itself wrongly: its preprocess.{key} is {repr(found[key])[:80]}")
    return tuple(found[key] for key in keys)


def _is_statistic(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(x) in (int, float) and isfinite(x) for x in value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "mean": _is_statistic,
    "std": lambda value: _is_statistic(value) and min(value) > 0,
    "size": lambda value: type(value) is int and value > 0,
    "resize": lambda value: type(value) is int and value > 0,
    "interpolation": lambda value: value in ("bilinear", "bicubic"),
    "format": lambda value: isinstance(value, str),
}


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
    return state_digest(network.state_dict())
