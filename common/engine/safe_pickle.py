"""Read pickles of plain containers and number arrays from files that nobody vouches for.

A pickle calls what it names, so a downloaded one can run any code. Here the few globals that an array's pickle names
are replaced by Python stand-ins and every other global is refused. Admitting NumPy's own would not do: their
``__setstate__`` takes attacker-chosen dtypes, and an object dtype over raw bytes is a forged pointer.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from d2distill.common.errors import DataError, UserError


def _text(value: str | bytes) -> str:
    # Python 2 wrote str as bytes.
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _raw(value: str | bytes | bytearray) -> bytes:
    return value.encode("latin1") if isinstance(value, str) else bytes(value)


class _DType:
    """Stand-in for numpy.dtype: numbers and booleans only."""

    def __init__(self, code: str | bytes, *flags: Any):
        self.value = np.dtype(_text(code))
        if self.value.kind not in "biuf":
            raise pickle.UnpicklingError(f"array type {self.value} is not a plain number")

    def __setstate__(self, state: tuple) -> None:
        self.value = self.value.newbyteorder(_text(state[1]))


class _Array:
    """Stand-in for numpy.ndarray; ``value`` is the array."""

    value: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = _from_buffer(data, dtype, shape, "F" if is_fortran else "C").value


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(data: Any, dtype: _DType, shape: Any, order: str = "C", *_: Any) -> _Array:
    array = _Array()
    # The copy is writable; an array over the pickle's bytes would not be.
    array.value = np.frombuffer(_raw(data), dtype=dtype.value).reshape(shape, order=order).copy()
    return array


def _scalar(dtype: _DType, data: Any) -> Any:
    return np.frombuffer(_raw(data), dtype=dtype.value)[0].item()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # Protocol 2 writes bytes as encode(text, "latin1").
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    # Protocol 2 writes b"" as bytes().
    return b""


_GLOBALS = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct, so it need not be callable
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _empty_bytes,
    ("__builtin__", "bytes"): _empty_bytes,
    # Its order is a dict's own; pickles call it without arguments or with a list of pairs.
    ("collections", "OrderedDict"): dict,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 renamed numpy.core to numpy._core.
        key = (module.replace("numpy._core", "numpy.core"), name)
        if key not in _GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays of numbers are admitted")
        return _GLOBALS[key]


_CYCLE = object()


class _Plain:
    """Puts arrays in the place of their stand-ins, throughout nested containers.

    What is referred to twice is converted once: else a small file of lists of lists could take years.
    """

    def __init__(self) -> None:
        self.done: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, _Array):
            return value.value
        if value is None or isinstance(value, str | bytes | bytearray | int | float):
            return value
        if not isinstance(value, dict | list | tuple):
            raise pickle.UnpicklingError(f"it holds a {type(value).__name__.strip('_')} where a value belongs")
        if id(value) not in self.done:
            self.done[id(value)] = _CYCLE
            if isinstance(value, dict):
                plain = {_text(k) if isinstance(k, bytes) else self(k): self(v) for k, v in value.items()}
            else:
                plain = type(value)(self(v) for v in value)
            self.done[id(value)] = plain
        if self.done[id(value)] is _CYCLE:
            raise pickle.UnpicklingError("a container in it holds itself")
        return self.done[id(value)]


def load_arrays(path: str | Path, error: type[UserError] = DataError) -> Any:
    """Unpickle a file of containers, text, numbers, None, and arrays of numbers, written by Python 2 or 3.

    Args:
        path: the file: a data set's, Detectron2's model zoo's, or Detectron's (Caffe2's).
        error: what to raise; CheckpointError where the file is one.

    Returns:
        The content. Dicts are plain, nested ones too, and their keys are str even where the file has bytes (other
        text stays as it is in the file); arrays are writable ndarrays in the file's byte order; NumPy's scalars are
        Python's.

    Raises:
        UserError: `error`: the file is not such a pickle; the message names the file, and the global it asked for if
            any.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        return _Plain()(content)
    except OSError:
        raise
    except Exception as reason:  # a damaged pickle raises nearly anything: EOFError, KeyError, TypeError, ...
        raise error(f"refused to read {path}: {str(reason) or type(reason).__name__}") from reason
