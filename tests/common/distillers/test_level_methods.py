"""PKD, CWD and MGD on lists of feature maps."""

import pytest
import torch
from torch.nn import functional as F

from d2distill.common.distillers import Context, cwd_loss, pkd_loss, random_mask
from d2distill.common.outputs import Outputs, OutputSpec
from tests.common.distillers.single_method import build, settings
from tests.goldens.fill import array

METHODS = pytest.mark.parametrize("name", ["PKD", "CWD", "MGD"])


def maps(seed, *shapes, scale=1.0):
    return [array(seed + i, *shape, scale=scale) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(("over", "shape"), [("space", (64, 1, 8, 8)), ("channel", (64, 5, 1, 1))])
@pytest.mark.parametrize("ratio", [0.0, 0.65, 1.0])
def test_random_mask(over, shape, ratio):
    torch.manual_seed(0)
    mask = random_mask(torch.zeros(64, 5, 8, 8), ratio, over)
    assert mask.shape == shape and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert 1 - mask.mean().item() == pytest.approx(ratio, abs=0.06 if 0 < ratio < 1 else 0)


def networks(n=2, scale=1.0, dtype=torch.float32):
    student = maps(31, (n, 3, 8, 8), (n, 4, 4, 4), (n, 8, 2, 2), scale=scale)
    teacher = maps(41, (n, 3, 8, 8), (n, 6, 6, 6), (n, 8, 2, 2), scale=scale)
    return Outputs(feats=[m.to(dtype).requires_grad_() for m in student]), Outputs(feats=[m.to(dtype) for m in teacher])


@METHODS
def test_learned_connectors_only_where_channels_differ(name):
    student, teacher = networks()
    method = build(name, student, teacher)
    assert [type(c).__name__ for c in method.connectors] == ["Conv2d", "Identity"]
    (value,) = method(student, teacher, None, Context()).values()
    value.backward()
    assert method.connectors[0].weight.grad.any() and student.feats[0].grad is None
    assert student.feats[1].grad.any() and student.feats[2].grad.any()
    assert all(p.grad is not None for p in method.parameters())


@METHODS
@pytest.mark.parametrize(("first", "levels", "used"), [(0, 0, [0, 1, 2]), (0, 2, [0, 1]), (1, 1, [1]), (-1, 0, [2])])
def test_first_and_levels_choose_the_maps(name, first, levels, used):
    student, teacher = networks()
    method = build(name, student, teacher, FIRST=first, LEVELS=levels)
    assert len(method.connectors) == len(used)
    method(student, teacher, None, Context())[f"loss_{name.lower()}"].backward()
    assert [i for i, m in enumerate(student.feats) if m.grad is not None] == used


@METHODS
def test_lists_of_other_length_meet_at_the_deep_end(name):
    student, teacher = networks()
    teacher.feats.insert(1, torch.zeros(2, 9, 5, 5))
    method = build(name, student, teacher)
    assert len(method.connectors) == 2 and method.connectors[0].out_channels == 6
    with pytest.raises(ValueError, match="which leaves none of the"):
        build(name, student, teacher, FIRST=3)


def test_methods_are_their_losses():
    student, teacher = networks()
    for name, loss in (("PKD", pkd_loss), ("CWD", cwd_loss)):
        method = build(name, student, teacher, WEIGHT=1.0)
        connected = [c(m) for c, m in zip(method.connectors, student.feats[1:], strict=True)]
        (value,) = method(student, teacher, None, Context()).values()
        assert value.item() == pytest.approx(loss(connected, teacher.feats[1:]).item(), rel=1e-6)


@pytest.mark.parametrize(("mask", "shape"), [("space", (2, 1, 6, 6)), ("channel", (2, 6, 1, 1))])
def test_mgd_generates_from_the_masked_map(mask, shape):
    student, teacher = networks()
    method = build("MGD", student, teacher, WEIGHT=1.0, LEVELS=1, MASK=mask)
    torch.manual_seed(3)
    (value,) = method(student, teacher, None, Context()).values()
    torch.manual_seed(3)
    drawn = (torch.rand(shape) >= 0.65).float()
    resized = F.interpolate(method.connectors[0](student.feats[1]), size=(6, 6), mode="bilinear")
    first, _, second = method.generators[0]
    generated = second(F.relu(first(resized * drawn)))
    assert value.item() == pytest.approx(((generated - teacher.feats[1]) ** 2).sum().item() / 2, rel=1e-5)
    # Masked positions learn nothing of themselves, and no gradient passes them at a ratio of 1.
    method.cfg.LAMBDA = 1.0
    (grad,) = torch.autograd.grad(method(student, teacher, None, Context())["loss_mgd"], student.feats[1])
    assert not grad.any()


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_digit_of_huge_features(name, dtype, autocast):
    student, teacher = networks(scale=1e4, dtype=dtype)
    method = build(name, student, teacher)
    torch.manual_seed(0)
    (plain,) = method(student, teacher, None, Context()).values()
    torch.manual_seed(0)
    with torch.autocast("cpu", autocast):
        (value,) = method(student, teacher, None, Context()).values()
    value.backward()
    assert torch.equal(plain, value) and value.dtype == torch.float32 and value.isfinite()
    assert all(m.grad.isfinite().all() for m in student.feats[1:])


@METHODS
def test_methods_on_an_empty_batch(name):
    student, teacher = networks(0)
    method = build(name, student, teacher)
    (value,) = method(student, teacher, None, Context()).values()
    value.backward()
    assert value.item() == 0 and student.feats[1].grad.shape == (0, 4, 4, 4)
    assert all(not p.grad.any() for p in method.parameters())


@METHODS
def test_specs_without_a_size(name):
    spec = OutputSpec(feats=((3,), (4,), (8,)))
    method = type(build(name, *networks()))(settings(name), spec, spec)
    assert not any(True for _ in method.connectors.parameters())
    student, teacher = (Outputs(feats=maps(seed, (2, 3, 9, 7), (2, 4, 5, 3), (2, 8, 3, 2))) for seed in (51, 61))
    assert method(student, teacher, None, Context())[f"loss_{name.lower()}"].isfinite()


def test_published_defaults():
    common = {"WEIGHT": 1.0, "WARMUP": 0, "TEACHER": 0, "FIRST": 1, "LEVELS": 0}
    assert settings("PKD") == {**common, "WEIGHT": 6.0}
    assert settings("CWD") == {**common, "WEIGHT": 10.0, "T": 1.0}
    assert settings("MGD") == {**common, "WEIGHT": 2e-5, "LAMBDA": 0.65, "MASK": "space"}
    with pytest.raises(ValueError, match="MASK"):
        build("MGD", *networks(), MASK="time")
