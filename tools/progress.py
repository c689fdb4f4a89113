"""How far runs in other processes are, as their logs say."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

__all__ = ["LastLine", "runs_bar"]


def runs_bar(ended: int, total: int) -> tqdm:
    """The progress of several runs, of which some have ended, on stderr."""
    return tqdm(
        desc=f"{ended}/{total} runs",
        initial=ended,
        total=total,
        bar_format="{desc}, {percentage:.0f} %, {elapsed}, about {remaining} left",
        smoothing=0,
        miniters=0,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )


class LastLine:
    """The last line of a run's metrics.json, for one who asks often.

    The file is opened when its size has changed, and read from where it ended before.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._line = folder / "metrics.json", {}
        self._size = self._start = 0

    def read(self) -> dict[str, float]:
        """The last whole line; empty where there is none yet."""
        with suppress(OSError, ValueError):  # no such file yet, or a line that a kill left unfinished
            size = os.stat(self._path).st_size
            if size != self._size:
                self._size = size
                self._read_new()
        return self._line

    def _read_new(self) -> None:
        if self._size < self._start:  # a resumed run has dropped the lines of steps that it repeats
            self._start = 0
        with open(self._path, "rb") as file:
            file.seek(self._start)
            whole, end, _ = file.read().rpartition(b"\n")
        if end:
            self._start += len(whole) + 1
            self._line = json.loads(whole.rpartition(b"\n")[2])
