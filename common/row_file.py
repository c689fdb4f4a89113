"""A table of equal rows in a memory-mapped file, for several processes and runs at once, in which torn rows are found.

A row is followed by a checksum of itself and its number, written after it: a row that was never written, was cut off by
a kill or a full disk, or is being written by another process is not valid.
"""

import mmap
import os
from pathlib import Path

import numpy as np

__all__ = ["RowFile"]

_GOLDEN = 0x9E3779B97F4A7C15


class RowFile:
    """Rows of `words` 64-bit words by their number. The file is sparse: only rows that were written take disk.

    Two processes that write the same row are to write the same bits. A file serves tables of any number of rows.

    Args:
        path: the file; made where there is none.
        rows: so many can be read and written here.

    Raises:
        OSError: the file cannot be made or mapped.
    """

    def __init__(self, path: str | Path, rows: int, words: int) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        size = rows * (words + 1) * 8
        if os.fstat(self._file).st_size < size:
            # Not ftruncate, which would cut what another process has made longer meanwhile. At worst this byte falls
            # into the checksum of a row that was just written, which then is written once more.
            os.pwrite(self._file, b"\0", size - 1)
        self._map = mmap.mmap(self._file, size, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_RANDOM)
        self._table = np.frombuffer(self._map, np.uint64).reshape(rows, words + 1)
        # Odd factors, one per word: a change in one word always changes the sum.
        self._factors = _mix(np.arange(1, words + 1, dtype=np.uint64)) | np.uint64(1)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies (N, words) of these rows, and which of them are valid (N,)."""
        found = self._table[numbers]
        rows = found[:, :-1]
        return rows, found[:, -1] == self._checksums(numbers, rows)

    def write(self, numbers: np.ndarray, rows: np.ndarray) -> None:
        """Write these rows (N, words).

        Raises:
            OSError: the disk is full. Writing into the mapped memory would end the process there.
        """
        whole = np.column_stack([rows, self._checksums(numbers, rows)])
        for number, row in zip(numbers.tolist(), whole, strict=True):
            os.pwrite(self._file, row, number * whole.strides[0])

    def bytes_on_disk(self) -> int:
        return os.fstat(self._file).st_blocks * 512

    def _checksums(self, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
        # Products keep high bits from reaching low ones; the shift before them lets every bit count.
        total = ((rows ^ (rows >> np.uint64(32))) * self._factors).sum(1, dtype=np.uint64)
        # Never 0, which is what a row that was never written has there.
        return _mix(total + _mix(numbers.astype(np.uint64))) | np.uint64(1)


def _mix(values: np.ndarray) -> np.ndarray:
    """The steps of the generator SplitMix64 (Steele et al., OOPSLA 2014), which scatter the bits of each value."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
