"""Gradient accumulation: a step's batch in parts, for batches that do not fit in memory."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

#: Splits a step's batch: (batch, step) to the parts of it and what the mean loss of each counts in the step's.
SplitBatch = Callable[[Any, int], list[tuple[Any, float]]]


def accumulate(split: SplitBatch, parts: int) -> SplitBatch:
    """`split` with each of its results cut into `parts` of nearly equal size.

    Order of data, batch size and schedule stay as they are: the gradient is that of the whole batch, but for batch
    norms and for methods that compare samples with each other, which see one part at a time.

    Args:
        split: gives batches that are a dict of tensors with a row per sample (other entries are handed to every part),
            or a list.
        parts: at most; a batch of fewer samples has fewer.
    """

    def split_further(batch: Any, step: int) -> list[tuple[Any, float]]:
        result = []
        for whole, weight in split(batch, step):
            rows = len(whole) if isinstance(whole, list) else len(whole["image"])
            size = -(-rows // parts) or 1
            for start in range(0, max(rows, 1), size):
                stop = min(start + size, rows)
                result.append((_rows(whole, start, stop, rows), weight * (stop - start) / rows if rows else weight))
        return result

    return split_further


def _rows(batch: Any, start: int, stop: int, rows: int) -> Any:
    if isinstance(batch, list):
        return batch[start:stop]
    return {
        name: part[start:stop] if isinstance(part, Tensor) and part.ndim and len(part) == rows else part
        for name, part in batch.items()
    }
