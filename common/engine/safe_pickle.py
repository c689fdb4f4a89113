"""Read pickles of plain containers and number arrays from untrusted files.

Unpickling calls whatever the file names, so a downloaded pickle can run any code. Here the few globals that arrays
need are replaced by stand-ins, and every other global is refused. NumPy's own are not safe to admit: their
``__setstate__`` accepts any dtype, and an object dtype over raw bytes is a forged pointer.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d2distill.common.errors import DataError, UserError

__all__ = ["RefusedGlobalError", "SafeUnpickler", "load_arrays"]


class RefusedGlobalError(pickle.UnpicklingError):
    """A pickle asks for something that is not admitted.

    Args:
        name: what it asks for, with its module.
    """

    def __init__(self, name: str) -> None:
        self.name = ascii(name)[1:-1][:100]
        super().__init__(f"it asks for {self.name}, and only arrays of numbers are admitted")


class _DType:
    """Stand-in for numpy.dtype: numbers and booleans only."""

    def __init__(self, code: str, *_: Any) -> None:
        self.value = np.dtype(str(code))
        if self.value.kind not in "biuf":
            raise pickle.UnpicklingError(f"array type {self.value} is not a plain number")

    def __setstate__(self, state: tuple) -> None:
        self.value = self.value.newbyteorder(str(state[1]))


class _Array(np.ndarray):
    """Stand-in for numpy.ndarray, filled from bytes by a checked dtype."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, is_fortran, data = state
        # Python 2 wrote its str as bytes, which are read as text of these codes. bytes() of a number would allocate it.
        data = data.encode("latin1") if isinstance(data, str) else memoryview(data).tobytes()
        super().__setstate__((version, shape, dtype.value, is_fortran, data))


def _from_buffer(data: Any, dtype: _DType, shape: Any, order: str) -> np.ndarray:
    # The copy is writable; an array over the pickle's bytes would not be.
    return np.frombuffer(data, dtype=dtype.value).reshape(shape, order=order).copy()


_GLOBALS = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): "ndarray",  # only an argument of _reconstruct, never called
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(0, np.uint8),
    ("numpy.core.multiarray", "scalar"): lambda dtype, data: np.frombuffer(data, dtype=dtype.value)[0].item(),
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    # Protocol 2 writes bytes as encode(text, "latin1"), and b"" as bytes(). The encoding could name any codec.
    ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),
    ("builtins", "bytes"): lambda: b"",
    ("__builtin__", "bytes"): lambda: b"",
    # Its order is a dict's own; pickles call it without arguments or with a list of pairs.
    ("collections", "OrderedDict"): dict,
}


_TUPLES = [code[0] for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)]


def _then_check_tuple(load: Callable[["SafeUnpickler"], None]) -> Callable[["SafeUnpickler"], None]:
    def load_and_check(self: "SafeUnpickler") -> None:
        load(self)
        self.check_tuple()

    return load_and_check


class SafeUnpickler(pickle._Unpickler):
    """Reads containers, text, numbers, None, and what `admitted` has by module and name, from a binary file.

    The Unpickler in Python: the one in C allocates whatever a file claims, and sets attributes of classes. Text of
    Python 2 is read as Latin-1.
    """

    admitted: Mapping[tuple[str, str], Any] = _GLOBALS
    #: Types of which instances are given a state.
    with_state: tuple[type, ...] = (_DType, _Array)
    dispatch = dict(pickle._Unpickler.dispatch)
    dispatch |= {code: _then_check_tuple(pickle._Unpickler.dispatch[code]) for code in _TUPLES}

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")
        # Depth and number of the tuples in each, by its id.
        self._tuples: dict[int, tuple[int, int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 renamed numpy.core to numpy._core.
        key = (module.replace("numpy._core", "numpy.core"), name)
        if key not in self.admitted:
            raise RefusedGlobalError(f"{module}.{name}")
        return self.admitted[key]

    def load_build(self) -> None:
        """Set the state of such an instance, and of a state dict the versions that it has there."""
        value, state = self.stack[-2:]
        if type(value) is OrderedDict:
            self.stack[-1] = {key: entry for key, entry in state.items() if key == "_metadata"}
        elif not isinstance(value, self.with_state):
            raise pickle.UnpicklingError(f"a {type(value).__name__} has no state")
        super().load_build()

    def load_bytearray8(self) -> None:
        """Read what is there before anything is allocated."""
        size = int.from_bytes(self.read(8), "little")
        data = self.read(size)
        if len(data) != size:
            raise EOFError("its bytes are cut off")
        self.append(bytearray(data))

    def check_tuple(self) -> None:
        """Refuse tuples of tuples without limit: as a key of a dict, one is hashed by walking along all of them."""
        parts = [self._tuples.get(id(part), (1, 1)) for part in self.stack[-1] if type(part) is tuple]
        depth, number = 1 + max((depth for depth, _ in parts), default=0), 1 + sum(number for _, number in parts)
        if depth > 20 or number > 10**6:
            raise pickle.UnpicklingError("its tuples hold too many others")
        self._tuples[id(self.stack[-1])] = depth, number

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def load_arrays(path: str | Path, error: type[UserError] = DataError) -> Any:
    """Unpickle a file of containers, text, numbers, None, and arrays of numbers, written by Python 2 or 3.

    Args:
        path: a data set's file, or weights of Detectron2's or Caffe2's model zoo.
        error: what to raise; CheckpointError where the file is a checkpoint.

    Returns:
        The content, with plain dicts, writable arrays, and NumPy's scalars as Python's. Python 2's str is read as text,
        and so are keys of bytes, which Python 3 makes of it.

    Raises:
        UserError: `error`, if the file is not such a pickle; the message names the global that the file asked for.
    """
    try:
        with open(path, "rb") as file:
            content = SafeUnpickler(file).load()
    except OSError:
        raise
    except Exception as reason:  # a damaged pickle raises nearly anything: EOFError, KeyError, TypeError, ...
        raise error(f"refused to read {path}: {str(reason) or type(reason).__name__}") from reason
    if isinstance(content, dict):
        return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    return content
