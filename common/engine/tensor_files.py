"""Files of tensors, written with a digest of their content, and read without running code from them.

Those of torch.save are not read by torch.load: where a flipped bit marks an archive's record as a folder, it returns
memory that was never written; it lets a file call NumPy's and torch's own constructors, which may allocate anything;
and an archive may be small only because it is compressed. Here the standard library reads the records and checks their
sums, and the only tensors are those of records that are as large as they claim.
"""

import argparse
import hashlib
import io
import json
import os
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import Tensor

from d2distill.common.engine.safe_pickle import SafeUnpickler

__all__ = [
    "ARCHIVE", "DIGEST", "LEGACY", "append_digest", "has_digest", "read_safetensors", "read_torch_file", "state_digest",
    "write_safetensors", "write_torch_file",
]  # fmt: skip

#: How files of torch.save begin: zip archives, and the pickle of a number in those from before torch 1.6.
ARCHIVE, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
#: What the pickles at the beginning of the latter hold.
_LEGACY_HEAD = (0x1950A86A20F9469CFC6C, 1001)

# The last bytes of a file with a digest: this and 64 hexadecimal digits of the SHA-256 of all bytes before it.
_MARK = b"d2distill sha256 "
_LENGTH = len(_MARK) + 64
#: Of safetensors files the metadata's entry with the digest, and of ONNX models the property.
DIGEST = "digest"
# The latter is written as protobuf does it: the field metadata_props (14), an entry with a key (1) and a value (2).
_ONNX_KEY = bytes([1 << 3 | 2, len(DIGEST), *DIGEST.encode(), 2 << 3 | 2, _LENGTH])
_ONNX_PROPERTY = bytes([14 << 3 | 2, len(_ONNX_KEY) + _LENGTH]) + _ONNX_KEY

#: A tensor of at most so many elements may repeat those of its storage.
_MAX_REPEATED = 2**20


def append_digest(file: IO[bytes]) -> None:
    """Append the digest of a whole file, open for reading and writing, where other readers take no notice of it.

    It becomes the comment of a zip archive (``.pth``, ``.pt2``, ``.ts``) without one, or a property of an ONNX model.
    """
    file.seek(0)
    if file.read(len(ARCHIVE)) == ARCHIVE:
        file.seek(-2, os.SEEK_END)
        file.write(_LENGTH.to_bytes(2, "little"))  # the length of the comment
    else:
        file.seek(0, os.SEEK_END)
        file.write(_ONNX_PROPERTY)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")
    file.seek(0, os.SEEK_END)
    file.write(_MARK + digest.hexdigest().encode())


def has_digest(file: IO[bytes]) -> bool:
    """Whether a file has a digest of :func:`append_digest`.

    Raises:
        ValueError: it has, and it is another one than the content's.
    """
    left = max(file.seek(0, os.SEEK_END) - _LENGTH, 0)
    file.seek(left)
    mark, found = file.read(len(_MARK)), file.read()
    if mark != _MARK:
        return False
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(min(left, 1 << 20)):
        digest.update(block)
        left -= len(block)
    if digest.hexdigest().encode() != found:
        raise ValueError("its bytes are not those that were written (another SHA-256)")
    return True


def state_digest(state: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> str:
    """SHA-256 of tensors with their names, in their order, and of their metadata."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode() if facts else b"")
    for name, value in state.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # Flat: in another memory format, axes of length 1 have strides of their own.
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy() if value.ndim else str(value.item()).encode())
    return digest.hexdigest()


def write_safetensors(state: Mapping[str, Tensor], facts: Mapping[str, str], file: IO[bytes]) -> None:
    """Write tensors and metadata, with their digest among the metadata."""
    from safetensors.torch import save

    # Copies, as tensors that share memory are refused. In this order, as a file has one of its own.
    state = {name: state[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in sorted(state)}
    facts = {"format": "pt", **facts}
    file.write(save(state, {**facts, DIGEST: state_digest(state, facts)}))


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file.

    Raises:
        ValueError: its digest is another one than the content's.
        Exception: nearly any other, where it is damaged.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        state, facts = {name: file.get_tensor(name) for name in sorted(file.keys())}, file.metadata() or {}
    if (found := facts.pop(DIGEST, None)) is not None and found != state_digest(state, facts):
        raise ValueError("its content is not what was written (another SHA-256)")
    return state, facts


def write_torch_file(content: Any, file: IO[bytes]) -> None:
    """Write what torch.save writes, and its digest, to an empty file open for reading and writing."""
    torch.save(content, file)
    append_digest(file)


def read_torch_file(file: IO[bytes]) -> tuple[Any, bool]:
    """Read a file of torch.save of any age.

    Returns:
        The content, with tensors on the CPU that need no gradient, and whether its digest was there, and right.

    Raises:
        RefusedGlobalError: it holds more than tensors, containers, text and numbers.
        Exception: nearly any other, where it is damaged.
    """
    digest = has_digest(file)
    file.seek(0)
    is_archive = file.read(len(ARCHIVE)) == ARCHIVE
    file.seek(0)
    return _read_archive(file) if is_archive else _read_legacy(file), digest


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *rest: Any) -> Tensor:
    """Stand-in for torch's functions that make a tensor of a storage; `rest` is (requires_grad, hooks, metadata)."""
    if rest[2:] and rest[2]:
        raise UnpicklingError("a tensor is stored conjugated or negated")
    # Stays within the storage, or raises.
    tensor = storage.as_strided(size, stride, storage.storage_offset() + offset)
    if tensor.numel() > max(storage.numel(), _MAX_REPEATED):
        raise UnpicklingError(f"a tensor of {tensor.numel()} elements has {storage.numel()} in the file")
    return tensor


def _tensor_of_bytes(
    storage: Tensor, offset: int, size: tuple, stride: tuple, grad: Any, hooks: Any, dtype: torch.dtype, *metadata: Any
) -> Tensor:
    """The same for types that have no typed storage."""
    return _tensor(storage.view(dtype), offset, size, stride, grad, hooks, *metadata)


_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
}  # fmt: skip
_GLOBALS = {
    **{("torch", f"{name}Storage"): dtype for name, dtype in _DTYPES.items()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    **{("torch", str(v).removeprefix("torch.")): v for v in vars(torch).values() if isinstance(v, torch.dtype)},
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_bytes,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda build, kind, arguments, state: build(*arguments),
    ("torch", "Tensor"): "Tensor",  # only arguments of the last, as the next
    ("torch.nn.parameter", "Parameter"): "Parameter",
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    # Options of a training, which RepDistiller saves beside the weights, and milestones of a schedule.
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "Counter"): Counter,
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, complex)},
}


class _TorchUnpickler(SafeUnpickler):
    """Reads what torch.save pickles; ``storage(key, dtype, number of elements, *view)`` gives the tensors' memory."""

    admitted = {**SafeUnpickler.admitted, **_GLOBALS}
    with_state = (*SafeUnpickler.with_state, argparse.Namespace)

    def __init__(self, file: IO[bytes], storage: Callable[..., Tensor] | None = None) -> None:
        super().__init__(file)
        self._storage = storage

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _location, number, *view = pid
        if kind != "storage" or self._storage is None:
            raise UnpicklingError(f"it has a {kind}, not a storage")
        return self._storage(key, dtype, number, *view)


def _read_archive(file: IO[bytes]) -> Any:
    with zipfile.ZipFile(file) as archive:
        records, names = archive.infolist(), archive.namelist()
        folders = [name.partition("/")[0] for name in names if name.partition("/")[2] == "data.pkl"]
        if len(folders) != 1 or len({*names}) != len(names):
            raise zipfile.BadZipFile("it is a zip archive, but not one of torch.save")
        if sum(record.file_size for record in records) > file.seek(0, os.SEEK_END):
            raise zipfile.BadZipFile("its records are larger than the file")

        def read(name: str) -> bytes:
            record = archive.getinfo(f"{folders[0]}/{name}")
            plain = record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
            if not plain or record.external_attr & 0x10:
                raise zipfile.BadZipFile(f"its record {name} is compressed or marked as a folder, as torch writes none")
            return archive.read(record)

        if f"{folders[0]}/byteorder" in names and read("byteorder") != b"little":
            raise zipfile.BadZipFile("it was written on a machine of another byte order")
        storages: dict[str, Tensor] = {}

        def storage(key: str, dtype: torch.dtype, number: int) -> Tensor:
            if key not in storages:
                data = read(f"data/{key}")
                storages[key] = torch.empty(len(data), dtype=torch.uint8)
                storages[key].numpy()[:] = memoryview(data)
            if len(storages[key]) != number * dtype.itemsize:
                raise UnpicklingError(f"storage {key} has {len(storages[key])} bytes, not {number} numbers of {dtype}")
            return storages[key].view(dtype)

        return _TorchUnpickler(io.BytesIO(read("data.pkl")), storage).load()


def _read_legacy(file: IO[bytes]) -> Any:
    """Read pickles of what the file is, of the content, and of its storages' names, and then these storages."""
    head = tuple(_TorchUnpickler(file).load() for _ in _LEGACY_HEAD)
    if head != _LEGACY_HEAD or not _TorchUnpickler(file).load()["little_endian"]:
        raise UnpicklingError("it is of another version of torch.save, or of another byte order")
    place = file.tell()
    left = file.seek(0, os.SEEK_END) - file.seek(place)
    storages: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, number: int, view: tuple[str, int, int] | None) -> Tensor:
        nonlocal left
        if key not in storages:
            left -= number * dtype.itemsize
            if left < 0:
                raise UnpicklingError("its storages are larger than the file")
            storages[key] = torch.empty(number, dtype=dtype)
        whole = storages[key]
        if whole.dtype != dtype or len(whole) != number:
            raise UnpicklingError(f"storage {key} has two types or sizes")
        return whole if view is None else whole[view[1] : view[1] + view[2]]

    content = _TorchUnpickler(file, storage).load()
    if sorted(keys := _TorchUnpickler(file).load()) != sorted(storages):
        raise UnpicklingError("its storages are not all there")
    for key in keys:
        memory = memoryview(storages[key].view(torch.uint8).numpy())
        if int.from_bytes(file.read(8), "little") != len(storages[key]) or file.readinto(memory) != len(memory):
            raise UnpicklingError(f"storage {key} is cut off")
    return content
