"""pkd_loss, cwd_loss, mgd_loss and their methods on lists of feature maps."""

import math

import pytest
import torch
from torch.nn import functional as F

from d2distill.common.distillers import Context, cwd_loss, mgd_loss, pkd_loss, random_mask
from d2distill.common.outputs import Outputs, OutputSpec
from tests.common.distillers.single_method import build, settings
from tests.goldens.fill import array

SHAPES = [(2, 3, 4, 4), (2, 5, 2, 3)]
LOSSES = pytest.mark.parametrize("loss", [pkd_loss, cwd_loss, mgd_loss])
METHODS = pytest.mark.parametrize("name", ["PKD", "CWD", "MGD"])


def maps(seed, *shapes, scale=1.0):
    return [array(seed + i, *shape, scale=scale) for i, shape in enumerate(shapes)]


def standardized(channel):
    mean = sum(channel) / len(channel)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in channel) / (len(channel) - 1))
    return [(v - mean) / (deviation + 1e-6) for v in channel]


def transcribed_pkd(student, teacher):
    total = 0.0
    for c in range(student.shape[1]):
        s, t = (standardized(m[:, c].flatten().tolist()) for m in (student, teacher))
        total += sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
    return total / student.numel() / 2


def transcribed_cwd(student, teacher, T=1.0):
    total = 0.0
    for s, t in zip(student.flatten(2).flatten(0, 1).tolist(), teacher.flatten(2).flatten(0, 1).tolist(), strict=True):
        s, t = [math.exp(v / T) for v in s], [math.exp(v / T) for v in t]
        total += sum(b / sum(t) * math.log(b / sum(t) / (a / sum(s))) for a, b in zip(s, t, strict=True))
    return T**2 * total / (student.shape[0] * student.shape[1])


def transcribed_mgd(student, teacher):
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    return sum((a - b) ** 2 for a, b in pairs) / len(student)


FORMULAS = [(pkd_loss, transcribed_pkd), (cwd_loss, transcribed_cwd), (mgd_loss, transcribed_mgd)]


@pytest.mark.parametrize(("loss", "formula"), FORMULAS)
def test_equals_the_formula(loss, formula):
    student, teacher = maps(1, *SHAPES, scale=2), maps(11, *SHAPES, scale=2)
    expected = sum(formula(s.double(), t.double()) for s, t in zip(student, teacher, strict=True))
    value = loss([m.double() for m in student], [m.double() for m in teacher])
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_cwd_at_a_temperature():
    student, teacher = array(1, 2, 3, 4, 4).double(), array(2, 2, 3, 4, 4).double()
    expected = transcribed_cwd(student, teacher, 4.0)
    assert cwd_loss([student], [teacher], 4.0).item() == pytest.approx(expected, rel=1e-11)


@LOSSES
def test_gradcheck(loss):
    student, teacher = [m.double() for m in maps(3, *SHAPES)], [m.double() for m in maps(13, *SHAPES)]
    student = [m.requires_grad_() for m in student]
    assert torch.autograd.gradcheck(lambda *s: loss(s, teacher), student)


@LOSSES
def test_sizes_and_depths(loss):
    student, teacher = maps(5, (2, 3, 4, 4), (2, 3, 8, 8)), maps(15, (2, 9, 9, 9), (2, 3, 2, 2), (2, 3, 16, 16))
    resized = [F.interpolate(s, size=t.shape[2:], mode="bilinear") for s, t in zip(student, teacher[1:], strict=True)]
    assert loss(student, teacher).item() == pytest.approx(loss(resized, teacher[1:]).item(), rel=1e-6)
    with pytest.raises(ValueError, match="channels"):
        loss([torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 4, 4, 4)])
    with pytest.raises(ValueError, match="no feature maps"):
        loss([], teacher)


@LOSSES
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 1, 1), (1, 3, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_for_huge_maps(loss, shape, dtype):
    student, teacher = (array(seed, *shape, scale=1e4).to(dtype) for seed in (7, 8))
    # A dead channel.
    student[:, 0] = 1e4
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss([student], [teacher])
    # Squares of 1e4 do not fit fp16: scaled as a loss is by its weight.
    (value * 2e-5).backward()
    assert value.dtype == torch.float32 and value.isfinite() and student.grad.isfinite().all()


@LOSSES
def test_zero_where_both_agree_and_no_gradient_to_the_teacher(loss):
    student, teacher = (array(9, 2, 3, 4, 4).requires_grad_() for _ in range(2))
    value = loss([student], [teacher])
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6) and teacher.grad is None and student.grad.abs().max() < 1e-6


@LOSSES
@pytest.mark.parametrize("size", [4, 6])
def test_empty_batch_is_zero_with_a_graph(loss, size):
    student = torch.zeros(0, 3, 4, 4, requires_grad=True)
    value = loss([student], [torch.zeros(0, 3, size, size)])
    value.backward()
    assert value.shape == () and value.item() == 0 and student.grad.shape == (0, 3, 4, 4)


def test_pkd_is_one_minus_the_correlation():
    student, teacher = array(17, 3, 4, 5, 5).double(), array(18, 3, 4, 5, 5).double()
    r = [torch.corrcoef(torch.stack([student[:, c].flatten(), teacher[:, c].flatten()]))[0, 1] for c in range(4)]
    # The deviation divides by n - 1, the mean by n.
    expected = (1 - sum(r) / 4).item() * (3 * 25 - 1) / (3 * 25)
    assert pkd_loss([student], [teacher]).item() == pytest.approx(expected, rel=1e-5)
    assert pkd_loss([5 * student + 2], [0.1 * teacher - 3]).item() == pytest.approx(expected, rel=1e-4)


def test_cwd_shifts_each_channel_freely():
    student, teacher = array(19, 2, 3, 4, 4).double(), array(20, 2, 3, 4, 4).double()
    shifted = cwd_loss([student + array(21, 2, 3, 1, 1)], [teacher])
    assert shifted.item() == pytest.approx(cwd_loss([student], [teacher]).item(), rel=1e-10)


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
