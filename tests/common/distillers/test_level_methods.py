"""What PKD, CWD and MGD put between two lists of feature maps."""

import pytest
import torch
from torch.nn import functional as F

from d2distill.common.distillers import random_mask
from d2distill.common.outputs import Batch, NetworkInfo, Outputs
from tests.common.distillers.single_method import build
from tests.goldens.fill import array

METHODS = pytest.mark.parametrize("name", ["PKD", "CWD", "MGD"])


def outputs(seed, *shapes, trainable=False):
    return Outputs(feats=[array(seed + i, 2, *shape).requires_grad_(trainable) for i, shape in enumerate(shapes)])


def networks():
    return outputs(31, (3, 8, 8), (4, 4, 4), (8, 2, 2), trainable=True), outputs(41, (3, 8, 8), (6, 6, 6), (8, 2, 2))


@pytest.mark.parametrize(("over", "shape"), [("space", (64, 1, 8, 8)), ("channel", (64, 5, 1, 1))])
@pytest.mark.parametrize("ratio", [0.0, 0.65, 1.0])
def test_random_mask(over, shape, ratio):
    torch.manual_seed(0)
    mask = random_mask(torch.zeros(64, 5, 8, 8), ratio, over)
    assert mask.shape == shape and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert 1 - mask.mean().item() == pytest.approx(ratio, abs=0.06 if 0 < ratio < 1 else 0)


@METHODS
def test_learned_connectors_only_where_channels_differ(name):
    student, teacher = networks()
    method = build(name, student, teacher)
    assert [type(c).__name__ for c in method.connectors] == ["Conv2d", "Identity"]
    method(student, teacher, Batch()).backward()
    assert method.connectors[0].weight.grad.any() and all(p.grad is not None for p in method.parameters())


@METHODS
@pytest.mark.parametrize(
    ("first", "levels", "used"), [(1, 0, [1, 2]), (0, 0, [0, 1, 2]), (0, 2, [0, 1]), (1, 1, [1]), (-1, 0, [2])]
)
def test_first_and_levels_choose_the_maps(name, first, levels, used):
    student, teacher = networks()
    method = build(name, student, teacher, FIRST=first, LEVELS=levels)
    assert len(method.connectors) == len(used)
    method(student, teacher, Batch()).backward()
    assert [i for i, m in enumerate(student.feats) if m.grad is not None and m.grad.any()] == used


@METHODS
def test_lists_of_other_length_meet_at_the_deep_end(name):
    student, teacher = networks()
    teacher.feats.insert(1, torch.full((2, 9, 5, 5), torch.nan))
    method = build(name, student, teacher)
    assert len(method.connectors) == 2 and method.connectors[0].out_channels == 6
    assert method(student, teacher, Batch()).isfinite()
    with pytest.raises(ValueError, match="which leaves none of the"):
        build(name, student, teacher, FIRST=3)


@pytest.mark.parametrize(("mask", "shape"), [("space", (2, 1, 6, 6)), ("channel", (2, 6, 1, 1))])
def test_mgd_generates_from_the_masked_map(mask, shape):
    student, teacher = networks()
    method = build("MGD", student, teacher, LEVELS=1, MASK=mask)
    torch.manual_seed(3)
    value = method(student, teacher, Batch())
    torch.manual_seed(3)
    drawn = (torch.rand(shape) >= 0.65).float()
    resized = F.interpolate(method.connectors[0](student.feats[1]), size=(6, 6), mode="bilinear")
    first, _, second = method.generators[0]
    generated = second(F.relu(first(resized * drawn)))
    assert value.item() == pytest.approx(((generated - teacher.feats[1]) ** 2).sum().item() / 2, rel=1e-5)
    # No gradient passes masked positions.
    method.cfg.LAMBDA = 1.0
    (grad,) = torch.autograd.grad(method(student, teacher, Batch()), student.feats[1])
    assert not grad.any()


@pytest.mark.parametrize("changed", [{"MASK": "time"}, {"LAMBDA": 1.0}, {"LAMBDA": -0.1}])
def test_mgd_settings(changed):
    with pytest.raises(ValueError, match=f"MGD: {next(iter(changed))}"):
        build("MGD", *networks(), **changed)


@METHODS
def test_maps_of_unknown_size(name):
    info = NetworkInfo(feats=((3,), (4,), (8,)))
    method = build(name, info, info)
    assert not list(method.connectors.parameters())
    student, teacher = (outputs(seed, (3, 9, 7), (4, 5, 3), (8, 3, 2)) for seed in (51, 61))
    assert method(student, teacher, Batch()).isfinite()
