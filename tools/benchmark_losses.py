"""Loss functions alone: ours against the formula as it is usually written, in time and memory."""

import inspect
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from d2distill.common import distillers
from d2distill.common.distillers._contrast import contrast_logits
from d2distill.tools import usual_losses

#: (batch, classes) of losses on logits, (batch, size) of those on embeddings, (batch, K) of those with a memory bank.
LOGITS = [(64, 100), (1024, 100), (64, 1000), (512, 1000), (1024, 1000), (64, 21000), (256, 21000)]
EMBEDDINGS = [(64, 256), (128, 256), (256, 256)]
CONTRASTS = [(64, 1024), (64, 4096), (64, 16384)]
BANK = (50000, 128)

Loss = Callable[..., Tensor]


def loss_pairs() -> Iterator[tuple[str, Loss, Loss, list[str]]]:
    """Name, usual formula, our function, and the names of the tensors that both take."""
    for name, usual in inspect.getmembers(usual_losses, inspect.isfunction):
        parameters = inspect.signature(usual).parameters.values()
        settings = [p.default for p in parameters if p.default is not p.empty]
        tensors = [p.name for p in parameters if p.default is p.empty]
        yield name, usual, _ours(getattr(distillers, f"{name}_loss"), tensors, settings), tensors


def _ours(function: Loss, names: list[str], settings: list[Any]) -> Loss:
    if "bank" not in names:
        return lambda *tensors: function(*tensors, *settings)

    def with_bank(embedding: Tensor, bank: Tensor, contrast: Tensor) -> Tensor:
        temperature, eps = settings
        scores = contrast_logits(embedding, bank, contrast) / temperature
        log_z = (scores.detach().exp().mean() * len(bank)).log()
        return function(scores - log_z, len(bank), eps)

    return with_bank


def loss_tensors(names: list[str], batch: int, size: int, device: str = "cpu", bank: tuple = BANK) -> list[Tensor]:
    """Random inputs, the same for the same arguments: logits and embeddings (batch, size); of the first the gradient.

    With a bank `size` is K, and the embeddings have the length of its rows.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for name in names:
        if name == "target":
            tensor = torch.randint(size, (batch,), generator=generator)
        elif name == "contrast":
            tensor = torch.randint(bank[0], (batch, 1 + size), generator=generator)
        elif "bank" in names:
            shape = bank if name == "bank" else (batch, bank[1])
            tensor = torch.nn.functional.normalize(torch.randn(shape, generator=generator))
        else:
            tensor = 3 * torch.randn(batch, size, generator=generator)
        made.append(tensor.to(device))
    made[0].requires_grad_()
    return made


def measure_losses(device: str = "cpu", quick: bool = False, seconds: float = 0.6) -> list[dict[str, Any]]:
    """A row per loss and size: milliseconds (medians of interleaved calls, forward and backward) and peak MB of both.

    Args:
        seconds: for the calls of one row; at least 3 of each.
    """
    rows = []
    for name, usual, ours, tensors in loss_pairs():
        grid = CONTRASTS if "bank" in tensors else LOGITS if "logits_student" in tensors else EMBEDDINGS
        for batch, size in grid[: 1 if quick else None]:
            inputs = loss_tensors(tensors, batch, size, device, (1000, 16) if quick else BANK)
            calls = {"usual": lambda f=usual, i=inputs: f(*i), "ours": lambda f=ours, i=inputs: f(*i)}
            times = _interleaved(calls, inputs[0], device, seconds)
            row: dict[str, Any] = {"loss": name, "batch": batch, "K" if "bank" in tensors else "size": size}
            for side, call in calls.items():
                row[f"{side}_ms"] = 1000 * statistics.median(times[side])
                row[f"{side}_mb"] = peak_memory(lambda call=call: call().backward(), device) / 1e6
                inputs[0].grad = None
            ratios = [a / b for a, b in zip(times["usual"], times["ours"], strict=True)]
            row["speedup"], row["memory"] = statistics.median(ratios), row["ours_mb"] / row["usual_mb"]
            rows.append(row)
    return rows


def _interleaved(calls: dict[str, Loss], leaf: Tensor, device: str, seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {side: [] for side in calls}
    end = time.perf_counter() + seconds
    while len(times["ours"]) < 4 or (time.perf_counter() < end and len(times["ours"]) < 200):
        for side, call in calls.items():
            leaf.grad = None
            start = time.perf_counter()
            call().backward()
            if device != "cpu":
                torch.cuda.synchronize()
            times[side].append(time.perf_counter() - start)
    return {side: values[1:] for side, values in times.items()}  # the first one warms up


def peak_memory(call: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes that torch's allocator has given out during a call, beyond those before it: temporaries included.

    On the CPU from the allocations in a trace of torch's profiler.
    """
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    total = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak


def use_usual_losses() -> set[str]:
    """Put the usual formulas in the place of our functions, in this process: those that take the same arguments.

    Returns:
        The methods' names, in lower case.
    """
    replaced = set()
    for name, usual in inspect.getmembers(usual_losses, inspect.isfunction):
        module = import_module(f"{distillers.__name__}.{name}")
        own = getattr(module, f"{name}_loss")
        if list(inspect.signature(own).parameters) == list(inspect.signature(usual).parameters):
            setattr(module, own.__name__, usual)
            replaced.add(name)
    return replaced
