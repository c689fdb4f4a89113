"""Read pickles of plain containers and number arrays from untrusted files.

Unpickling calls whatever the file names, so a downloaded pickle can run any code. Here the few globals that arrays
need are replaced by Python stand-ins, and every other global is refused. NumPy's own globals are not safe to admit:
their ``__setstate__`` accepts any dtype, and an object dtype over raw bytes is a forged pointer. torch's weights_only
loader reads only what torch.save wrote.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from d2distill.common.errors import DataError, UserError


def _text(value: str | bytes) -> str:
    # Python 2 wrote str as bytes.
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


class _DType:
    """Stand-in for numpy.dtype: numbers and booleans only."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
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


def _from_buffer(data: Any, dtype: _DType, shape: Any, order: str = "C", *_: Any) -> _Array:
    array = _Array()
    # The copy is writable; an array over the pickle's bytes would not be.
    array.value = np.frombuffer(data, dtype=dtype.value).reshape(shape, order=order).copy()
    return array


_GLOBALS = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): "ndarray",  # only an argument of _reconstruct, never called
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy.core.multiarray", "scalar"): lambda dtype, data: np.frombuffer(data, dtype=dtype.value)[0].item(),
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    # Protocol 2 writes bytes as encode(text, "latin1"), and b"" as bytes(). The encoding could name any codec.
    ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),
    ("builtins", "bytes"): lambda: b"",
    ("__builtin__", "bytes"): lambda: b"",
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


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """Replace the stand-ins by arrays throughout nested containers.

    `done` holds what was converted, by id: without it a small file of lists of lists could take years.
    """
    if isinstance(value, _Array):
        return value.value
    if value is None or isinstance(value, str | bytes | bytearray | int | float):
        return value
    if not isinstance(value, dict | list | tuple):
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__.strip('_')} where a value belongs")
    if id(value) not in done:
        # A container in itself ends in a RecursionError.
        if isinstance(value, dict):
            plain = {_text(k) if isinstance(k, bytes) else _plain(k, done): _plain(v, done) for k, v in value.items()}
        else:
            plain = type(value)(_plain(v, done) for v in value)
        done[id(value)] = plain
    return done[id(value)]


def load_arrays(path: str | Path, error: type[UserError] = DataError) -> Any:
    """Unpickle a file of containers, text, numbers, None, and arrays of numbers, written by Python 2 or 3.

    Args:
        path: a data set's file, or weights of Detectron2's or Caffe2's model zoo.
        error: what to raise; CheckpointError where the file is a checkpoint.

    Returns:
        The content, with plain dicts whose keys are str even where the file has bytes (other bytes stay), writable
        arrays in the file's byte order, and NumPy's scalars as Python's.

    Raises:
        UserError: `error`, if the file is not such a pickle; the message names the global that the file asked for.
    """
    try:
        with open(path, "rb") as file:
            return _plain(_Unpickler(file, encoding="bytes").load(), {})
    except OSError:
        raise
    except Exception as reason:  # a damaged pickle raises nearly anything: EOFError, KeyError, TypeError, ...
        raise error(f"refused to read {path}: {str(reason) or type(reason).__name__}") from reason
