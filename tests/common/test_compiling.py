"""Compiled networks give what the eager ones do, for any number of images, and give way to them where they fail."""

import copy
import functools
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2distill.common.engine.compiling import CompiledOrEager, FrozenNetwork, TrainedNetwork, fold_batch_norms
from d2distill.common.outputs import Outputs

PARTS = ("feats", "logits")


class Tiny(nn.Module):
    """Two convolutions with batch norms; like a library's network it may find its maps by hooks."""

    def __init__(self, hooks: bool = False) -> None:
        super().__init__()
        self.stem, self.layer = (nn.Sequential(nn.Conv2d(i, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for i in (3, 8))
        self.fc, self.hooks = nn.Linear(8, 5), hooks

    def outputs(self, images):
        maps = []
        layers = [self.stem, self.layer] if self.hooks else []
        handles = [layer.register_forward_hook(lambda *args: maps.append(args[-1])) for layer in layers]
        x = self.stem(images)
        feats = [x, self.layer(x)]
        for handle in handles:
            handle.remove()
        pooled = feats[-1].mean((2, 3))
        return Outputs(self.fc(pooled), maps if self.hooks else feats, None, pooled)


def tiny(hooks=False):
    """The same each time, with running statistics."""
    torch.manual_seed(0)
    network = Tiny(hooks)
    network.train().outputs(torch.randn(16, 3, 8, 8))
    return network


@pytest.fixture
def without_inductor(monkeypatch):
    """What torch.compile traces is run by torch's own kernels, which takes no minute; test_speed.py has the rest."""
    torch._dynamo.reset()
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda function, options=None, **other: compiled(function, **other))
    # Nothing may be compiled twice.
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_frozen_network_takes_any_number_of_images(without_inductor, precision):
    network, images = tiny(hooks=True).eval().requires_grad_(False), torch.randn(6, 3, 8, 8)
    frozen = FrozenNetwork(network, PARTS, rows=4)
    with torch.autocast("cpu", precision, enabled=precision is not None):
        expected = network.outputs(images)
        found = {rows: frozen(images[:rows]) for rows in (2, 4, 6, 0)}
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision is None else {"rtol": 0.05, "atol": 0.05}
    for rows, outputs in found.items():
        assert outputs.pooled is None and len(outputs.feats) == 2
        torch.testing.assert_close(outputs.logits, expected.logits[:rows], **tolerance)
        torch.testing.assert_close(outputs.feats, [feat[:rows] for feat in expected.feats], **tolerance)
        # To the bit whatever the batch.
        assert torch.equal(outputs.logits, found[6].logits[:rows])
    # A method's trainable layers may take them.
    assert not found[4].logits.requires_grad and not found[4].logits.is_inference()


def test_batch_norms_are_folded_into_the_convolutions_before_them():
    class More(Tiny):
        def outputs(self, images):
            found = super().outputs(images)
            found.extras["more"] = self.after(self.twice(self.twice(found.feats[-1])))
            return found

    network, images = More().eval(), torch.randn(4, 3, 8, 8)
    network.load_state_dict(tiny().state_dict())
    # One that is used twice keeps its own; so does a norm of something else.
    network.twice = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    network.after = nn.BatchNorm2d(8)
    with torch.no_grad():
        expected = network.eval().outputs(images)
        folded = fold_batch_norms(network, images)
        found = folded.outputs(images)
    kinds = {name: type(module) for name, module in folded.named_modules()}
    assert [kinds[name] for name in ("stem.1", "layer.1")] == [nn.Identity] * 2
    assert [kinds[name] for name in ("twice.1", "after")] == [nn.BatchNorm2d] * 2
    assert isinstance(network.stem[1], nn.BatchNorm2d) and network.stem[0].weight is not folded.stem[0].weight
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.extras["more"], expected.extras["more"], rtol=1e-4, atol=1e-5)


def test_a_compiled_network_trains_as_the_eager_one_does(without_inductor):
    """50 steps; every fifth batch is smaller, as the last one of an epoch is."""
    states = {}
    for kind in ("eager", "compiled"):
        network = tiny()
        # An error would not be seen if it ran eagerly then.
        run = {"eager": network.outputs, "compiled": TrainedNetwork(network, PARTS, rows=8)}[kind]
        optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
        torch.manual_seed(1)
        for step in range(50):
            images, target = torch.randn(5 if step % 5 == 4 else 8, 3, 8, 8), torch.randint(5, (8,))
            outputs = run(images)
            assert (outputs.pooled is None) == (kind == "compiled" and len(images) == 8)
            optimizer.zero_grad()
            loss = F.cross_entropy(outputs.logits, target[: len(images)]) + outputs.feats[-1].square().mean()
            loss.backward()
            optimizer.step()
        states[kind] = {**network.state_dict(), "loss": loss.detach()}
    torch.testing.assert_close(states["compiled"], states["eager"], rtol=1e-4, atol=1e-5)
    assert states["compiled"]["stem.1.num_batches_tracked"] == 51


def test_what_cannot_be_compiled_runs_eagerly(monkeypatch, caplog):
    network, images = tiny().eval(), torch.randn(2, 3, 8, 8)

    def without_compiler(graph, **options):
        def run(images):
            raise RuntimeError("\nInvalidCxxCompiler: No working C++ compiler found\nlong advice")

        return run

    monkeypatch.setattr(torch, "compile", without_compiler)
    run = CompiledOrEager("The teacher Tiny", FrozenNetwork(network, PARTS, rows=4), network.outputs)
    with caplog.at_level(logging.WARNING, "detectron2.d2distill"):
        results = [run(images).logits for _ in range(2)]
    assert all(torch.equal(logits, network.outputs(images).logits) for logits in results)
    (line,) = caplog.messages
    assert line == (
        "The teacher Tiny is not compiled, and runs eagerly: RuntimeError: InvalidCxxCompiler: No working C++ compiler "
        "found"
    )


def test_a_graph_that_computes_something_else_is_not_used(monkeypatch):
    network, images = tiny().eval(), torch.randn(2, 3, 8, 8)
    wrong = copy.deepcopy(network)
    nn.init.zeros_(wrong.fc.weight)

    def compile_wrongly(graph, **options):
        return lambda images: {"feats": wrong.outputs(images).feats, "logits": wrong.outputs(images).logits}

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    with pytest.raises(RuntimeError, match="its logits would be others than those of the eager network"):
        FrozenNetwork(network, PARTS, rows=4)(images)
    torch.testing.assert_close(FrozenNetwork(network, ["feats"], rows=4)(images).feats, network.outputs(images).feats)
