"""A teacher that remembers: what it gave for an image with an augmentation is looked up the next time."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2distill.common.engine.run_folder import write_text
from d2distill.common.errors import ConfigError
from d2distill.common.outputs import Batch, Outputs
from d2distill.common.row_file import RowFile
from d2distill.common.teachers import TeacherSource

__all__ = ["CACHED_PARTS", "CachedTeacher", "TeacherMemory", "spread_rest"]

logger = logging.getLogger("detectron2.d2distill")
#: The parts of `Outputs` that can be remembered.
CACHED_PARTS = ("logits", "pooled", "feats", "preacts")
#: Rows that the teacher computes at a time, by the kind of device.
_CHUNK = {"cpu": 16}
_CHUNK_ON_GPU = 64


@dataclass(frozen=True)
class TeacherMemory:
    """Where a teacher's outputs are kept, and of what they are.

    Attributes:
        folder: holds one folder for each teacher and way of making its images, which any number of runs share.
        name: begins that folder's name; for people.
        identity: everything else that the outputs depend on: weights, data, augmentation, arithmetic. What differs in
            any of it is in another folder. Plain values, which ``identity.json`` there shows.
        samples, variants: a row for each of so many images in so many versions.
        max_bytes: what the rows may take; with more, the first so many samples are remembered.
        logits_dtype: torch.float16 rounds logits (to 11 bits, relative error at most 2**-11) in half the space; None
            keeps them as they are.
        top_k: keep so many of the logits, see :func:`spread_rest`; 0: all.
        precision: of autocast, None without.
    """

    folder: Path
    name: str
    identity: Mapping[str, Any]
    samples: int
    variants: int
    max_bytes: int
    logits_dtype: torch.dtype | None = None
    top_k: int = 0
    precision: torch.dtype | None = None


class CachedTeacher(TeacherSource):
    """Another source, whose outputs are kept in files and looked up by `Batch.host_index` and `Batch.key`.

    What is not there is computed in chunks of one fixed size, filled up by repeating, so that a row's bits do not
    depend on which others were missing: a student is the same to the bit whatever the files held before, and however
    often its training was interrupted. Against the source itself, outputs differ by the rounding of another batch size
    (and by what `TeacherMemory` says of logits). Batches without numbers, or of a further view, go to the source.

    A needed part is kept in a file of its own, ``feats`` and ``preacts`` in one for each map; see :mod:`.row_file`.

    Args:
        source: has been told whom it serves, and has no `extras`.
        example: what it gives for any image, by which the sizes are known.
        memory: see there.
        device: of the source.

    Raises:
        ConfigError: the folder cannot be used.
    """

    def __init__(self, source: TeacherSource, example: Outputs, memory: TeacherMemory, device: torch.device) -> None:
        super().__init__()
        self.source, self.memory, self.device = source, memory, device
        self.needs, self.extras = source.needs, source.extras
        self.chunk = _CHUNK.get(device.type, _CHUNK_ON_GPU)
        given = {name: getattr(example, name) for name in CACHED_PARTS if name in self.needs}
        #: Number of maps of each part, None of a single tensor.
        self.layout = {name: len(value) if isinstance(value, list) else None for name, value in given.items()}
        names = [f"{name}.{i}" for name, number in self.layout.items() for i in range(number or 1)]
        self.parts = [
            _Part(name, value, memory.logits_dtype, memory.top_k) if name == "logits.0" else _Part(name, value)
            for name, value in zip(names, self._flat(example), strict=True)
        ]
        self.row_bytes = sum(8 * (part.words + 1) for part in self.parts)
        of_sample = memory.variants * self.row_bytes
        self.samples = min(memory.samples, memory.max_bytes // of_sample)
        arithmetic = {"precision": str(memory.precision), "device": device.type, "rows at a time": self.chunk}
        arithmetic |= {"torch": torch.__version__, "logits kept as": str(memory.logits_dtype), "top k": memory.top_k}
        arithmetic |= {"float32 products": torch.get_float32_matmul_precision(), "variants": memory.variants}
        text = json.dumps({**memory.identity, "arithmetic": arithmetic}, indent=2, sort_keys=True, ensure_ascii=False)
        prefix = re.sub(r"[^\w.-]+", "_", memory.name)
        self.folder = memory.folder / f"{prefix}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.files = self._open(text) if self.samples else []
        self._writes = True
        self._log_size()

    def compile(self, rows: int) -> None:
        self.source.compile(self.chunk)

    def replay(self, device: torch.device) -> None:
        self.source.replay(device)

    def _flat(self, outputs: Outputs) -> list[Tensor]:
        values = (getattr(outputs, name) for name in self.layout)
        return [tensor for value in values for tensor in (value if isinstance(value, list) else [value])]

    def _open(self, identity: str) -> list[RowFile]:
        rows = self.samples * self.memory.variants
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "identity.json").exists():
                write_text(self.folder / "identity.json", identity + "\n")
            return [RowFile(self.folder / f"{part.name}.rows", rows, part.words) for part in self.parts]
        except OSError as error:
            raise ConfigError(
                f"MODEL.TEACHER.CACHE {self.memory.folder} cannot be used: {error.strerror or error}; choose another "
                "folder, or '' for none"
            ) from error

    def _log_size(self) -> None:
        memory, names = self.memory, " and ".join(sorted(self.needs))
        whole = memory.samples * memory.variants * self.row_bytes
        size = (
            f"{names} of {memory.samples} images x {memory.variants} variants x {self.row_bytes} bytes = "
            f"{_gigabytes(whole)}"
        )
        held = _gigabytes(sum(file.bytes_on_disk() for file in self.files))
        part = ""
        if self.samples < memory.samples:
            part = (
                f"; MODEL.TEACHER.CACHE_GB {memory.max_bytes / 1e9:g} holds the first {self.samples} images, the "
                "others are computed each time"
            )
        logger.info(f"MODEL.TEACHER.CACHE {self.folder}: {size}, of which {held} are there{part}")

    def __call__(self, inputs: Any, batch: Batch) -> Outputs:
        if batch.host_index is None or batch.key is None or batch.view:
            return self.source(inputs, batch)
        index, key = batch.host_index.cpu().numpy(), batch.key.cpu().numpy()
        rows, valid, numbers, kept = self._read(index, key)
        missing = np.flatnonzero(~valid)
        if len(missing):
            computed = self._compute(inputs, missing)
            for stored, new in zip(rows, computed, strict=True):
                stored[missing] = new
            write = kept[missing]
            self._write(numbers[missing[write]], [new[write] for new in computed])
        return self._decode(rows)

    def missing(self, start: int, stop: int) -> np.ndarray:
        """Which of the rows start..stop-1 are not valid; row ``index * variants + key`` is of an image and its key."""
        numbers = np.arange(start, max(start, stop))
        valid = [np.ones(len(numbers), bool), *(file.read(numbers)[1] for file in self.files)]
        return numbers[~np.logical_and.reduce(valid)]

    def _read(self, index: np.ndarray, key: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        """Rows of each part, which samples have all of them, the rows' numbers, and which samples have a row at all."""
        # A negative key is of a sample that is like no other.
        kept = (index < self.samples) & (key >= 0)
        numbers = np.where(kept, index * self.memory.variants + key, 0)
        if not self.files:
            return [np.empty((len(index), part.words), np.uint64) for part in self.parts], kept, numbers, kept
        found = [file.read(numbers) for file in self.files]
        return [rows for rows, _ in found], np.logical_and.reduce([kept, *(ok for _, ok in found)]), numbers, kept

    def _compute(self, inputs: Tensor, places: np.ndarray) -> list[np.ndarray]:
        """Rows (len(places), words) of each part, for these of the images."""
        padded = np.resize(places, -(-len(places) // self.chunk) * self.chunk)
        chunks = []
        for start in range(0, len(padded), self.chunk):
            chosen = torch.from_numpy(padded[start : start + self.chunk]).to(inputs.device)
            outputs = self._run(inputs[chosen])
            chunks.append([part.encode(v) for part, v in zip(self.parts, self._flat(outputs), strict=True)])
        return [np.concatenate(rows)[: len(places)] for rows in zip(*chunks, strict=True)]

    def _run(self, images: Tensor) -> Outputs:
        precision, kind = self.memory.precision, self.device.type
        with ExitStack() as contexts:
            # Those of a training step, also where rows are computed ahead of it.
            contexts.enter_context(torch.autocast(kind, precision, enabled=precision is not None))
            contexts.enter_context(torch.jit.optimized_execution(kind != "cpu"))
            return self.source(images, Batch())

    def _write(self, numbers: np.ndarray, rows: list[np.ndarray]) -> None:
        if not self._writes or not len(numbers):
            return
        try:
            for file, new in zip(self.files, rows, strict=True):
                file.write(numbers, new)
        except OSError as error:
            self._writes = False
            logger.warning(
                f"MODEL.TEACHER.CACHE {self.folder} is no longer written to: {error.strerror}; what is there is used"
            )

    def _decode(self, rows: list[np.ndarray]) -> Outputs:
        values = (part.decode(stored, self.device) for part, stored in zip(self.parts, rows, strict=True))
        return Outputs(
            **{
                name: next(values) if number is None else [next(values) for _ in range(number)]
                for name, number in self.layout.items()
            }
        )


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.3g} MB"


def spread_rest(values: Tensor, indices: Tensor, rest: Tensor, classes: int) -> Tensor:
    """Logits (N, classes) that are `values` (N, k) at `indices`, and `rest` (N, 1) at all other classes."""
    return rest.expand(-1, classes).scatter(1, indices.long(), values)


class _Part:
    """One tensor of the outputs as rows of 64-bit words.

    With `top_k` a row of logits has its k largest, their classes, and one logit that stands for each of the others:

        log(mean over the other classes of exp(logit))

    with which each of the k keeps its probability, and the others share the rest of the softmax's mass evenly. That
    is so at temperature 1, as in Fast Knowledge Distillation (Shen and Xing, ECCV 2022) and TinyViT (Wu et al., ECCV
    2022); at a higher temperature the k keep their ratios to each other, but the others have more mass than they had.
    """

    def __init__(self, name: str, example: Tensor, kept_as: torch.dtype | None = None, top_k: int = 0) -> None:
        self.name, self.shape, self.dtype = name, example.shape[1:], example.dtype
        self.kept_as, self.top_k = kept_as or self.dtype, top_k if top_k < math.prod(self.shape) else 0
        self.fields = [(field.shape[1], field.dtype) for field in self._fields(example)]
        self.bytes = sum(width * dtype.itemsize for width, dtype in self.fields)
        self.words = -(-self.bytes // 8)

    def _fields(self, value: Tensor) -> list[Tensor]:
        flat = value.flatten(1)
        if not self.top_k:
            return [flat.to(self.kept_as)]
        flat = flat.float()
        values, indices = flat.topk(self.top_k)
        others = flat.scatter(1, indices, -math.inf)
        rest = others.logsumexp(1, keepdim=True) - math.log(flat.shape[1] - self.top_k)
        small = flat.shape[1] <= torch.iinfo(torch.int16).max
        return [torch.cat([values, rest], 1).to(self.kept_as), indices.to(torch.int16 if small else torch.int32)]

    def encode(self, value: Tensor) -> np.ndarray:
        """Rows (N, words) of a batch of values."""
        data = torch.cat([each.contiguous().view(torch.uint8) for each in self._fields(value)], 1).cpu()
        rows = np.zeros((len(value), self.words), np.uint64)
        rows.view(np.uint8)[:, : self.bytes] = data.numpy()
        return rows

    def decode(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """The values of rows, on the device."""
        data = torch.from_numpy(rows.view(np.uint8)[:, : self.bytes])
        if device.type == "cuda":
            # Pinned, so that the host does not wait for the copy.
            data = data.contiguous().pin_memory()
        data, fields, start = data.to(device, non_blocking=True), [], 0
        for width, dtype in self.fields:
            stop = start + width * dtype.itemsize
            fields.append(data[:, start:stop].clone(memory_format=torch.contiguous_format).view(dtype))
            start = stop
        values = fields[0].to(self.dtype)
        if self.top_k:
            values = spread_rest(values[:, :-1], fields[1], values[:, -1:], self.shape[0])
        return values.reshape(len(rows), *self.shape)
