"""dist_loss, nkd_loss, rld_loss, wttm_loss: values, identities, gradients, extremes."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from common.distillers import dist_loss, dkd_loss, kd_loss, nkd_loss, rld_loss, wttm_loss
from tests.common.distillers.building import settings
from tests.goldens.fill import array


def dist(student, teacher, target, temperature=4.0):
    return dist_loss(student, teacher, 1.5, 0.5, temperature)


def nkd(student, teacher, target, temperature=3.0):
    return nkd_loss(student, teacher, target, 3.5, temperature)


def rld(student, teacher, target, temperature=4.0):
    return rld_loss(student, teacher, target, 1.5, 8.0, 2.0, temperature)


def wttm(student, teacher, target, temperature=10.0):
    return wttm_loss(student, teacher, 1 / temperature)


def softmax(row, temperature=1.0):
    powers = [math.exp(v / temperature) for v in row]
    return [p / sum(powers) for p in powers]


def pearson(x, y, eps=1e-8):
    x, y = ([v - sum(values) / len(values) for v in values] for values in (x, y))
    norms = math.sqrt(sum(v * v for v in x)) * math.sqrt(sum(v * v for v in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / (norms + eps)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def transcribed_dist(student, teacher, target, T):
    s, t = [softmax(row, T) for row in student], [softmax(row, T) for row in teacher]
    rows = [pearson(a, b) for a, b in zip(s, t, strict=True)]
    columns = [pearson([r[c] for r in s], [r[c] for r in t]) for c in range(len(s[0]))]
    return T**2 * (1.5 * (1 - sum(rows) / len(rows)) + 0.5 * (1 - sum(columns) / len(columns)))


def transcribed_nkd(student, teacher, target, T):
    total = 0.0
    for s, t, y in zip(student, teacher, target, strict=True):
        total -= softmax(t)[y] * math.log(softmax(s)[y])
        others = [c for c in range(len(s)) if c != y]
        q_s, q_t = softmax([s[c] for c in others], T), softmax([t[c] for c in others], T)
        total -= 3.5 * T**2 * sum(a * math.log(b) for a, b in zip(q_t, q_s, strict=True))
    return total / len(student)


def transcribed_rld(student, teacher, target, T):
    total = 0.0
    for s, t, y in zip(student, teacher, target, strict=True):
        p_s, p_t = softmax(s, 2.0)[y], max(softmax(t, 2.0))
        total += 1.5 * 2.0**2 * kl([p_t, 1 - p_t], [p_s, 1 - p_s])
        below = [c for c in range(len(t)) if t[c] < t[y]]
        total += 8.0 * T**2 * kl(softmax([t[c] for c in below], T), softmax([s[c] for c in below], T)) if below else 0
    return total / len(student)


def transcribed_wttm(student, teacher, target, T):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        powers = [p ** (1 / T) for p in softmax(t)]
        total += sum(powers) * kl([p / sum(powers) for p in powers], softmax(s))
    return total / len(student)


LOSSES = pytest.mark.parametrize("loss", [dist, nkd, rld, wttm])
FORMULAS = [(dist, transcribed_dist), (nkd, transcribed_nkd), (rld, transcribed_rld), (wttm, transcribed_wttm)]


@pytest.mark.parametrize(("loss", "formula"), FORMULAS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("samples", "classes"), [(6, 2), (6, 3), (6, 10), (1, 4)])
def test_equals_the_formula(loss, formula, temperature, samples, classes):
    student, teacher = (array(seed, samples, classes, scale=3) for seed in (1, 2))
    target = torch.arange(samples) % classes
    expected = formula(student.double().tolist(), teacher.double().tolist(), target.tolist(), temperature)
    value = loss(student.double(), teacher.double(), target, temperature)
    assert value.item() == pytest.approx(expected, rel=1e-11)
    assert loss(student, teacher, target, temperature).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@LOSSES
@pytest.mark.parametrize("classes", [2, 5])
def test_gradcheck(loss, classes):
    teacher, target = array(6, 4, classes, scale=2).double(), torch.tensor([0, 1, 0, 1])
    student = array(5, 4, classes, scale=2).double().requires_grad_()
    assert torch.autograd.gradcheck(partial(loss, teacher=teacher, target=target), student)


@LOSSES
@pytest.mark.parametrize(("samples", "classes"), [(8, 2), (8, 100), (1, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_finite_for_huge_logits(loss, samples, classes, dtype, autocast):
    student = (1e4 * array(7, samples, classes).sign()).to(dtype).requires_grad_()
    teacher = (1e4 * array(8, samples, classes).sign()).to(dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        value = loss(student, teacher, torch.arange(samples) % classes)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and value > -1e-4
    assert student.grad.isfinite().all()


@LOSSES
def test_autocast_changes_no_digit(loss):
    student, teacher = array(7, 8, 100), array(8, 8, 100)
    plain = loss(student, teacher, torch.arange(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher, torch.arange(8)), plain)


@LOSSES
def test_empty_batch_is_zero_with_a_graph(loss):
    student = torch.zeros(0, 10, requires_grad=True)
    value = loss(student, torch.zeros(0, 10), torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value.shape == () and value.item() == 0 and student.grad.shape == (0, 10)


@LOSSES
def test_no_gradient_to_the_teacher_and_none_changed(loss):
    student, teacher = array(9, 6, 10).requires_grad_(), array(10, 6, 10).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    loss(student, teacher, torch.arange(6)).backward()
    assert teacher.grad is None and student.grad.any()
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@LOSSES
def test_logits_may_be_shifted(loss):
    student, teacher, target = array(10, 6, 20).double(), array(11, 6, 20).double(), torch.arange(6)
    shifted = loss(student + 5, teacher - 7, target)
    assert shifted.item() == pytest.approx(loss(student, teacher, target).item(), rel=1e-11)


@pytest.mark.parametrize("loss", [nkd, rld, wttm])
def test_batch_is_a_mean(loss):
    student, teacher, target = array(12, 6, 20).double(), array(13, 6, 20).double(), torch.arange(6)
    single = [loss(student[i : i + 1], teacher[i : i + 1], target[i : i + 1]).item() for i in range(6)]
    assert loss(student, teacher, target).item() == pytest.approx(sum(single) / 6, rel=1e-12)


@pytest.mark.parametrize("loss", [nkd, rld])
def test_one_class_is_refused(loss):
    with pytest.raises(ValueError, match="other classes"):
        loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))


def test_dist_sees_predictions_up_to_scale():
    teacher = array(25, 8, 4).double().softmax(1)
    alike, opposite = 0.25 + 0.3 * (teacher - 0.25), 0.25 - 0.3 * (teacher - 0.25)
    assert dist_loss(alike.log(), teacher.log(), 2.0, 3.0).item() == pytest.approx(0, abs=1e-5)
    assert dist_loss(opposite.log(), teacher.log(), 2.0, 0.0).item() == pytest.approx(4, abs=1e-5)
    assert dist_loss(opposite.log(), teacher.log(), 0.0, 3.0).item() == pytest.approx(6, abs=1e-5)


def test_dist_of_one_sample_has_no_gradient_between_samples():
    student = array(14, 1, 5).requires_grad_()
    value = dist_loss(student, array(15, 1, 5), beta=0.0, gamma=2.0, temperature=3.0)
    value.backward()
    assert value.item() == pytest.approx(18) and not student.grad.any()


def test_nkd_is_cross_entropy_for_a_certain_teacher():
    student, target = array(16, 6, 10).double(), torch.arange(6)
    certain = 1e4 * F.one_hot(target, 10).double()
    assert nkd_loss(student, certain, target, 0.0, 3.0).item() == pytest.approx(
        F.cross_entropy(student, target).item(), rel=1e-12
    )


def test_nkd_decomposes_the_soft_cross_entropy():
    # -sum p_t log p_s = the target's part - (1 - p_t[y]) * [log(1 - p_s[y]) + sum q_t log q_s] at T 1.
    student, teacher, target = array(17, 1, 10).double(), array(18, 1, 10).double(), torch.tensor([4])
    p_s, p_t = student.softmax(1)[0, 4], teacher.softmax(1)[0, 4]
    rest = nkd_loss(student, teacher, target, 1.0, 1.0) - nkd_loss(student, teacher, target, 0.0, 1.0)
    whole = -p_t * p_s.log() + (1 - p_t) * (rest - (1 - p_s).log())
    assert whole.item() == pytest.approx(F.cross_entropy(student, teacher.softmax(1)).item(), rel=1e-12)


def test_rld_with_a_right_teacher_is_decoupled_distillation():
    student, teacher = array(19, 6, 10, scale=3), array(20, 6, 10, scale=3)
    target = teacher.argmax(1)
    value = rld_loss(student, teacher, target, 1.5, 8.0, 4.0, 4.0)
    assert value.item() == pytest.approx(dkd_loss(student, teacher, target, 1.5, 8.0, 4.0).item(), rel=1e-6)


def test_rld_with_the_target_last_leaves_the_confidence():
    student, teacher = array(21, 6, 10, scale=3).requires_grad_(), array(22, 6, 10, scale=3)
    value = rld_loss(student, teacher, teacher.argmin(1), 0.0, 8.0, 1.0, 4.0)
    value.backward()
    assert value.item() == 0 and not student.grad.any()


def test_wttm_at_exponent_1_is_plain_distillation():
    student, teacher = array(23, 6, 10), array(24, 6, 10)
    assert wttm_loss(student, teacher, 1.0).item() == pytest.approx(kd_loss(student, teacher, 1.0).item(), rel=1e-6)


def test_published_defaults():
    common = {"WEIGHT": 1.0, "WARMUP": 0, "TEACHER": 0, "STANDARDIZE": False}
    assert settings("DIST") == {**common, "WEIGHT": 2.0, "BETA": 1.0, "GAMMA": 1.0, "T": 4.0}
    assert settings("NKD") == {**common, "GAMMA": 3.5, "T": 3.0}
    assert settings("RLD") == {**common, "WARMUP": 20, "ALPHA": 1.0, "BETA": 8.0, "ALPHA_T": 1.0, "T": 4.0}
    assert settings("WTTM") == {**common, "WEIGHT": 45.0, "GAMMA": 0.1}
