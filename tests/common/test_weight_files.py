"""Checkpoints as others write them: which weights are taken, under which names, and why others are not."""

import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from d2distill.common.engine.weight_files import preprocess_in, read_content, read_weights, weights_digest
from d2distill.common.engine.weight_loading import load_weights
from d2distill.common.errors import CheckpointError


class Network(nn.Sequential):
    def __init__(self, width=4, classes=3):
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, width, 1), nn.Linear(width, classes)
        self.classifiers = ["fc"]


class Wrapped(nn.Module):
    """A network with a child whose name is also that of a wrapper."""

    def __init__(self):
        super().__init__()
        self.model = Network()


def state_of(network=None, value=None, prefix=""):
    state = (network or Network()).state_dict()
    return {prefix + n: t if value is None else torch.full_like(t, value) for n, t in state.items()}


def saved(folder, content, name="f.pth"):
    torch.save(content, folder / name)
    return str(folder / name)


def loaded(source, network=None, **options):
    network = network or Network()
    load_weights(network, source, "KEY", **options)
    return network.state_dict()


def all_are(state, value):
    return all((tensor == value).all() for tensor in state.values())


AVERAGED = {
    "timm": {"state_dict": state_of(value=1.0), "state_dict_ema": state_of(value=2.0), "epoch": 3},
    "torchvision": {
        "model": state_of(value=1.0),
        "model_ema": {"n_averaged": torch.tensor(7), **state_of(value=2.0, prefix="module.")},
    },
    "nested": {"model": state_of(value=1.0), "ema": {"state_dict": state_of(value=2.0), "decay": 0.99}},
}


@pytest.mark.parametrize("form", AVERAGED)
def test_which_of_live_and_averaged_weights(tmp_path, form, log):
    source = saved(tmp_path, AVERAGED[form])
    live, averaged = (next(k for k in AVERAGED[form] if ("ema" in k) is kind) for kind in (False, True))
    assert all_are(loaded(source), 2)
    assert f"({averaged}): {averaged} is read; USE_EMA False takes {live}" in log.text
    assert all_are(loaded(source, use_ema=False), 1)
    assert f"{live} is read; USE_EMA True takes {averaged}" in log.text
    # A detector has no such setting.
    assert all_are(read_weights(source), 1)


def test_a_file_with_averaged_weights_alone(tmp_path, log):
    network = Network()
    average = AveragedModel(network)
    for entry in ({"model_ema": average.state_dict()}, average.state_dict()):
        source = saved(tmp_path, entry)
        for use_ema in (True, False):
            assert torch.equal(loaded(source, use_ema=use_ema)["fc.weight"], network.fc.weight)
    assert "USE_EMA" not in log.text


@pytest.mark.parametrize("prefix", ["model.", "net.", "network.", "module.model.", "model._orig_mod."])
def test_lightning(tmp_path, prefix, log):
    state = {**state_of(value=1.0, prefix=prefix), "loss.weight": torch.ones(3), "accuracy.total": torch.ones(1)}
    assert all_are(loaded(saved(tmp_path, {"state_dict": state, "global_step": 4})), 1)
    assert "passed over: loss.weight, accuracy.total" in log.text


@pytest.mark.parametrize(
    "content",
    [
        {"state": {"model": state_of(value=1.0, prefix="module."), "optimizers": {"SGD": {}}}, "rng": []},  # Composer
        {"model_state": state_of(value=1.0), "epoch": 1},
        {"weights": state_of(value=1.0)},
        {"params": state_of(value=1.0)},
        {"optimizer": {"state": {}}, "model": {"state_dict": state_of(value=1.0)}},
    ],
)
def test_entries(tmp_path, content):
    assert all_are(loaded(saved(tmp_path, content)), 1)


def test_a_network_may_have_a_child_of_a_prefixs_name(tmp_path):
    for prefix in ("", "model.", "module."):
        source = saved(tmp_path, state_of(Wrapped(), 1.0, prefix))
        assert all_are(loaded(source, Wrapped()), 1)
    # Where the network is not known, a wrapper is all that is certain.
    assert "model.fc.weight" in read_weights(saved(tmp_path, state_of(Wrapped(), prefix="module.")))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_weights_that_are_not_finite(tmp_path, value):
    state = {name: tensor.double() for name, tensor in state_of(value=1.0).items()}
    state["fc.weight"][1, 2] = value
    with pytest.raises(CheckpointError, match=r"^KEY: .*/bad\.pth is not finite: fc\.weight has NaN or infinite"):
        loaded(saved(tmp_path, {"model": state}, "bad.pth"))
    # What is not read does not matter.
    content = {"model": state_of(value=1.0), "optimizer": {"state": {0: {"momentum": state["fc.weight"]}}}}
    assert all_are(loaded(saved(tmp_path, content)), 1)


class Positions(nn.Module):
    def __init__(self, patches):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, 2))


MISFITS = {
    "classes": (
        Network(),
        state_of(Network(classes=9)),
        r"of another number of classes than Network here: .*\(9, 4\) instead of \(3, 4\)",
    ),
    "width": (
        Network(),
        state_of(Network(width=8)),
        r"of another network than Network here: 3 of another shape.*; 1 of 4 tensors fit",
    ),
    "size": (
        Positions(16),
        state_of(Positions(196)),
        r"of another image size than Positions here \(positions of 14 x 14 patches, here 4 x 4\)",
    ),
    "prefix": (
        Network(),
        state_of(prefix="encoder."),
        r"not one of the names of Network here: its names begin with encoder\., .*it has encoder\.body\.weight, .*; "
        r"the network has body\.weight",
    ),
    "own prefix": (Wrapped(), state_of(), r"the network's names begin with model\., the other's do not"),
    "nothing": (
        Network(),
        {"conv.weight": torch.ones(1)},
        r"Network here; it has conv\.weight; the network has body\.weight, body\.bias, fc\.weight, \.\.\.$",
    ),
    "no weights": (
        Network(),
        {"student": {}, "epoch": 3},
        r"holds no state dict, .* 'model', .*; it has student, epoch",
    ),
}


@pytest.mark.parametrize("cause", MISFITS)
def test_the_cause_is_named(tmp_path, cause):
    network, content, message = MISFITS[cause]
    with pytest.raises(CheckpointError, match=rf"^KEY: {tmp_path}/f\.pth .*{message}"):
        loaded(saved(tmp_path, content), network)


def test_a_digest_does_not_depend_on_the_memory_format():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))
    before = weights_digest(network)
    assert weights_digest(network.to(memory_format=torch.channels_last)) == before
    network[0].bias.data[0] += 1
    assert weights_digest(network) != before


def test_what_is_shared_in_a_pickle_stays_shared(tmp_path):
    """Walking along all ways would take forever in a file of a few bytes."""
    content = {"w": np.ones(2)}
    for _ in range(30):
        content = {"a": content, "b": content}
    (tmp_path / "f.pkl").write_bytes(pickle.dumps({"model": content}))
    read = read_content(str(tmp_path / "f.pkl"))["model"]
    assert read["a"] is read["b"] and read["a"]["b"] is read["b"]["a"]


def test_a_file_that_holds_itself(tmp_path):
    content = {0: torch.ones(1)}
    content.update(dict.fromkeys(("model", "ema", "state_dict"), content))
    torch.save(content, tmp_path / "f.pth")
    (tmp_path / "f.pkl").write_bytes(pickle.dumps({"model": {(1,): 1.0}}))
    for name in ("f.pth", "f.pkl"):
        with pytest.raises(CheckpointError, match=f"{name} holds no state dict"):
            read_weights(str(tmp_path / name))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("mean", value) for value in ("abc", [1, 2], [1, 2, "3"], [1, 2, math.nan], {"a": 1}, [[1], [2], [3]])),
        *(("std", value) for value in ([1, 1, 0], [1, 1, -1], [1, 1, 1e999], None)),
        *(("size", value) for value in (0, -3, 2.5, "32", True, [])),
        *(("interpolation", value) for value in ("x", 3, [])),
        *(("format", value) for value in (3, ["RGB"])),
    ],
)
def test_a_description_of_odd_types(key, value):
    with pytest.raises(CheckpointError, match=rf"^f\.pth describes itself wrongly: its preprocess\.{key} is "):
        preprocess_in({"preprocess": {key: value}}, "f.pth", key)
    assert preprocess_in({"preprocess": value}, "f.pth", key) is None
