"""What a table of networks and exported files says of each: size, speed and accuracy."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tabulate import tabulate
from torch import nn

__all__ = ["Row", "median_ms", "state_bytes", "table"]


@dataclass
class Row:
    """A network, or a file of one.

    Attributes:
        parameters, flops: None where they are those of the row above.
        size: in bytes, of the file or of the weights alone.
        latency: median milliseconds by batch size.
        metrics: in percent, of the pictures that were there; empty where none had labels.
        difference: from the student, in words.
    """

    label: str
    parameters: int | None
    flops: int | None
    size: int
    latency: dict[int, float]
    metrics: dict[str, float] = field(default_factory=dict)
    difference: str = ""


def table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """A Markdown table with a column for each of `metrics` that any row has."""
    lines = []
    for row in rows:
        line = {
            "": row.label,
            "parameters": _with_unit(row.parameters, 1e6, "M"),
            "FLOPs": _with_unit(row.flops, 1e9, "G"),
            "size": _with_unit(row.size, 1e6, "MB"),
        }
        line |= {f"batch {size}": f"{ms:.2f} ms" for size, ms in row.latency.items()}
        line |= {name: f"{row.metrics[name]:.2f}" for name in metrics if name in row.metrics}
        lines.append(line | {"differs from the student by": row.difference})
    return tabulate(lines, "keys", tablefmt="github", disable_numparse=True)


def _with_unit(value: int | None, unit: float, name: str) -> str:
    return "" if value is None else f"{value / unit:.3g} {name}"


def state_bytes(network: nn.Module) -> int:
    """Bytes of a network's state dict."""
    return sum(value.nbytes for value in network.state_dict().values())


def median_ms(run: Callable[[], object], device: torch.device, seconds: float = 0.5) -> float:
    """Median time of a call in milliseconds: two to warm up, then as many as `seconds` hold, from 3 to 100."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(2):
        timed()
    times = [timed()]
    while len(times) < 3 or (sum(times) < seconds and len(times) < 100):
        times.append(timed())
    return 1000 * statistics.median(times)
