"""What surrounds a CUDA graph: which calls it takes, what they give, where it gives way. Graphs themselves need a GPU:
see tests/classification/test_speed.py; here a stand-in runs the function anew."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from d2distill.common.engine import cuda_graphs
from d2distill.common.engine.cuda_graphs import WARMUP_CALLS, CudaGraph, map_tensors
from d2distill.common.outputs import Batch, Outputs, Progress

CPU = torch.device("cpu")


@pytest.fixture
def replays(monkeypatch):
    """The number of replays of each graph; a replay writes to where the results and gradients of the capture are."""
    counts = []

    def capture(function):
        results, number = function(), len(counts)
        counts.append(0)
        kept = [*cuda_graphs._tensors(results)]

        def replay():
            counts[number] += 1
            for own, new in zip(kept, cuda_graphs._tensors(function()), strict=True):
                own.detach().copy_(new.detach())

        return replay, results

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    return counts


def test_it_follows_its_inputs(replays):
    graph = CudaGraph("It", lambda x, more: {"sum": x + more["y"][0], "twice": [2 * x]}, CPU)
    for step in range(8):
        x = torch.full((2, 3), float(step))
        results = graph(x, {"y": (torch.ones(3), None), "name": "a"})
        assert torch.equal(results["sum"], x + 1) and torch.equal(results["twice"][0], 2 * x)
    assert replays == [8 - WARMUP_CALLS]


@pytest.mark.parametrize(
    "other",
    [
        (torch.ones(3, 3), {"y": torch.ones(3)}),
        (torch.ones(2, 3, dtype=torch.float64), {"y": torch.ones(3)}),
        (torch.ones(2, 3), {"y": 1.0}),
    ],
    ids=["another size", "another type", "no tensor"],
)
def test_other_shapes_run_as_they_are(replays, other):
    """The last batch of an epoch; the graph is there again afterwards."""
    graph = CudaGraph("It", lambda x, more: x * 3 + more["y"], CPU)
    usual = (torch.zeros(2, 3), {"y": torch.ones(3)})
    for step in range(2 * WARMUP_CALLS + 2):
        args = other if step % (WARMUP_CALLS + 2) == WARMUP_CALLS + 1 else usual
        assert torch.equal(graph(*args), args[0] * 3 + args[1]["y"])
    assert replays == [WARMUP_CALLS + 1]


def test_gradients_are_those_of_the_last_call(replays):
    layer = nn.Linear(3, 1, bias=False)
    unused, memory = nn.Parameter(torch.ones(1)), torch.empty(1, 3)

    def backward(x):
        layer(x).sum().backward()
        # A graph's gradients stay where they were when it was captured.
        memory.copy_(layer.weight.grad)
        layer.weight.grad = memory

    graph = CudaGraph("It", backward, CPU, [layer.weight, unused])
    for step in range(6):
        layer.weight.grad = None
        graph(torch.full((2, 3), float(step)))
        assert torch.equal(layer.weight.grad, torch.full((1, 3), 2.0 * step)) and unused.grad is None
    assert replays == [6 - WARMUP_CALLS]


def test_what_depends_on_the_step_is_not_frozen(replays, caplog):
    """It runs on, and the log says which."""

    def scaled(x, batch):
        return x * batch.progress.fraction

    graph, names = CudaGraph("The step", scaled, CPU), []
    for step in range(WARMUP_CALLS + 3):
        found = graph(torch.ones(2), Batch(progress=Progress(step, fraction=step / 10)))
        assert torch.equal(found, torch.full((2,), step / 10))
        names.append(graph.failed)
    assert not any(names[:WARMUP_CALLS]) and all(names[WARMUP_CALLS:]) and replays == []
    assert caplog.messages == [
        "The step is not replayed as a CUDA graph: RuntimeError: it reads batch.progress.fraction, which changes from "
        "step to step"
    ]


def test_tensors_within():
    @dataclass
    class Pair:
        first: torch.Tensor
        second: float

    value = {"a": [torch.ones(1), (Pair(torch.ones(2), 1.5), "text")], "b": Outputs(feats=[torch.ones(3)]), "c": None}
    doubled = map_tensors(lambda part: part * 2, value)
    assert doubled["a"][0].item() == 2 and doubled["a"][1][1] == "text" and doubled["c"] is None
    assert doubled["a"][1][0].second == 1.5 and doubled["a"][1][0].first.tolist() == [2, 2]
    assert doubled["b"].feats[0].tolist() == [2, 2, 2] and doubled["b"].logits is None
