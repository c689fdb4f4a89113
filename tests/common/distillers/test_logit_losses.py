"""kd_loss and dkd_loss: values, identities, gradients, extremes."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from common.distillers import decoupled_kl, dkd_loss, kd_loss
from tests.goldens.fill import array

TARGET = torch.tensor([3, 0, 99, 57, 41, 41])


def kd(student, teacher, target, temperature=4.0):
    return kd_loss(student, teacher, temperature)


def dkd(student, teacher, target, temperature=4.0):
    return dkd_loss(student, teacher, target, 1.0, 8.0, temperature)


LOSSES = pytest.mark.parametrize("loss", [kd, dkd])


def transcribed_kd(student, teacher, target, temperature):
    """The formula of Hinton et al., sample by sample and class by class."""
    total = 0.0
    for s, t in zip((student / temperature).double(), (teacher / temperature).double(), strict=True):
        p, q = t.exp() / t.exp().sum(), s.exp() / s.exp().sum()
        total += sum(p[c] * (p[c] / q[c]).log() for c in range(len(p)))
    return temperature**2 * total / len(student)


def transcribed_dkd(student, teacher, target, temperature, alpha=1.0, beta=8.0):
    """Equations 3 to 7 of Zhao et al., sample by sample and class by class."""
    total = 0.0
    for s, t, y in zip((student / temperature).double(), (teacher / temperature).double(), target, strict=True):
        p, q = t.exp() / t.exp().sum(), s.exp() / s.exp().sum()
        others = [c for c in range(len(p)) if c != y]
        rest_p, rest_q = sum(p[c] for c in others), sum(q[c] for c in others)
        tckd = p[y] * (p[y] / q[y]).log() + rest_p * (rest_p / rest_q).log()
        nckd = sum(p[c] / rest_p * ((p[c] / rest_p) / (q[c] / rest_q)).log() for c in others)
        total += alpha * tckd + beta * nckd
    return temperature**2 * total / len(student)


@pytest.mark.parametrize(("loss", "formula"), [(kd, transcribed_kd), (dkd, transcribed_dkd)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_equals_the_formula(loss, formula, temperature, classes):
    student, teacher = array(1, 5, classes, scale=3), array(2, 5, classes, scale=3)
    target = torch.arange(5) % classes
    expected = formula(student, teacher, target, temperature).item()
    assert loss(student.double(), teacher.double(), target, temperature).item() == pytest.approx(expected, rel=1e-12)
    # fp32 logits are exact to 2e-7, which T^2 magnifies where the divergence is small.
    assert loss(student, teacher, target, temperature).item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("golden", "loss"),
    [
        ("kd_T1", lambda s, t: kd_loss(s, t, 1)),
        ("kd_T4", lambda s, t: kd_loss(s, t, 4)),
        ("dkd_1_8_4.0", lambda s, t: dkd_loss(s, t, TARGET, 1, 8, 4)),
        ("dkd_1_0.5_1.0", lambda s, t: dkd_loss(s, t, TARGET, 1, 0.5, 1)),
        ("dkd_1_0.25_1.0", lambda s, t: dkd_loss(s, t, TARGET, 1, 0.25, 1)),
        ("dkd_2.5_0.0_2.0", lambda s, t: dkd_loss(s, t, TARGET, 2.5, 0, 2)),
    ],
)
def test_equals_the_reference(loss_goldens, golden, loss):
    student = array(21, 6, 100, scale=3).requires_grad_()
    value = loss(student, array(22, 6, 100, scale=3))
    value.backward()
    assert value.item() == pytest.approx(loss_goldens[golden]["loss"], rel=2e-6)  # both are fp32
    assert student.grad.norm().item() == pytest.approx(loss_goldens[golden]["grad"][0], rel=1e-6)


def test_equals_the_reference_for_confident_networks(loss_goldens):
    student = (10 * array(21, 6, 100, scale=3)).requires_grad_()
    value = dkd(student, 10 * array(22, 6, 100, scale=3), TARGET)
    value.backward()
    golden = loss_goldens["dkd_confident"]
    assert value.item() == pytest.approx(golden["loss"], rel=1e-6)
    assert student.grad.norm().item() == pytest.approx(golden["grad"][0], rel=1e-6)


def test_kd_is_the_sum_of_its_decoupled_parts():
    student, teacher, target = array(3, 6, 100, scale=3), array(4, 6, 100, scale=3), TARGET
    tckd, nckd = decoupled_kl(student, teacher, target, 4.0)
    p_target = F.softmax(teacher / 4, 1).gather(1, target[:, None])[:, 0]
    assert 16 * (tckd + (1 - p_target) * nckd).mean().item() == pytest.approx(
        kd_loss(student, teacher, 4).item(), rel=1e-6
    )


@LOSSES
def test_gradcheck(loss):
    teacher, target = array(6, 4, 5, scale=2).double(), torch.tensor([0, 4, 2, 2])
    student = array(5, 4, 5, scale=2).double().requires_grad_()
    assert torch.autograd.gradcheck(partial(loss, teacher=teacher, target=target), student)


@LOSSES
@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_finite_for_huge_logits(loss, classes, dtype, autocast):
    student = (1e4 * array(7, 8, classes).sign()).to(dtype).requires_grad_()
    teacher = (1e4 * array(8, 8, classes).sign()).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(student, teacher, torch.arange(8) % classes)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and value > 0
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
def test_zero_where_both_agree_and_no_gradient_to_the_teacher(loss):
    student, teacher = array(9, 6, 100).requires_grad_(), array(9, 6, 100).requires_grad_()
    value = loss(student, teacher, TARGET)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5) and teacher.grad is None
    assert student.grad.abs().max() < 1e-6


@LOSSES
def test_logits_may_be_shifted(loss):
    student, teacher = array(10, 6, 100).double(), array(11, 6, 100).double()
    shifted = loss(student + 5, teacher - 7, TARGET)
    assert shifted.item() == pytest.approx(loss(student, teacher, TARGET).item(), rel=1e-12)


@LOSSES
def test_batch_is_a_mean(loss):
    student, teacher = array(12, 6, 100).double(), array(13, 6, 100).double()
    single = [loss(student[i : i + 1], teacher[i : i + 1], TARGET[i : i + 1]).item() for i in range(6)]
    assert loss(student, teacher, TARGET).item() == pytest.approx(sum(single) / 6, rel=1e-12)


def test_two_classes_leave_nothing_to_the_other_classes():
    _, nckd = decoupled_kl(array(14, 4, 2), array(15, 4, 2), torch.tensor([0, 1, 0, 1]), 1.0)
    assert torch.equal(nckd, torch.zeros(4))


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="other classes"):
        dkd(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
