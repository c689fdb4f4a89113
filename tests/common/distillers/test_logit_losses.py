"""Every loss on logits: its formula, gradients, extremes, reduction. What one of them has to itself is in
test_logit_properties.py."""

from functools import partial

import pytest
import torch

from d2distill.common import distillers
from d2distill.common.distillers import DISTILLERS, LogitDistiller
from tests.common.distillers import formulas
from tests.goldens.fill import array


def kd(student, teacher, target, temperature=4.0):
    return distillers.kd_loss(student, teacher, temperature)


def dkd(student, teacher, target, temperature=4.0):
    return distillers.dkd_loss(student, teacher, target, 1.0, 8.0, temperature)


def dist(student, teacher, target, temperature=4.0):
    return distillers.dist_loss(student, teacher, 1.5, 0.5, temperature)


def nkd(student, teacher, target, temperature=3.0):
    return distillers.nkd_loss(student, teacher, target, 3.5, temperature)


def rld(student, teacher, target, temperature=4.0):
    return distillers.rld_loss(student, teacher, target, 1.5, 8.0, 2.0, temperature)


def wttm(student, teacher, target, temperature=10.0):
    return distillers.wttm_loss(student, teacher, 1 / temperature)


def bckd(student, teacher, target, temperature=None):
    return distillers.bckd_loss(student, teacher, target)


LOSSES = {loss.__name__: loss for loss in (kd, dkd, dist, nkd, rld, wttm, bckd)}


def losses(but=()):
    return pytest.mark.parametrize("loss", [loss for loss in LOSSES.values() if loss not in but])


def test_none_is_left_out():
    assert {name.lower() for name, method in DISTILLERS if issubclass(method, LogitDistiller)} == set(LOSSES)


@losses()
@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.0])
@pytest.mark.parametrize(("samples", "classes"), [(6, 2), (6, 3), (6, 10), (1, 4)])
def test_equals_the_formula(loss, temperature, samples, classes):
    student, teacher = (array(seed, samples, classes, scale=3) for seed in (1, 2))
    target = torch.arange(samples) % classes
    formula = getattr(formulas, loss.__name__)
    expected = formula(student.double().tolist(), teacher.double().tolist(), target.tolist(), temperature)
    value = loss(student.double(), teacher.double(), target, temperature)
    assert value.item() == pytest.approx(expected, rel=1e-11)
    # fp32 logits are exact to 2e-7, which T^2 magnifies where the divergence is small.
    tolerance = 3e-6 if loss in (kd, dkd, bckd) else 1e-5
    value = loss(student, teacher, target, temperature)
    assert value.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)


@losses()
@pytest.mark.parametrize("classes", [2, 5])
def test_gradcheck(loss, classes):
    teacher, target = array(6, 4, classes, scale=2).double(), torch.tensor([0, 1, 0, classes - 1])
    student = array(5, 4, classes, scale=2).double().requires_grad_()
    assert torch.autograd.gradcheck(partial(loss, teacher=teacher, target=target), student)


@losses()
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
    assert value > 0 or loss not in (kd, dkd, bckd) or samples == 1
    assert student.grad.isfinite().all()


@losses()
def test_autocast_changes_no_digit(loss):
    student, teacher = array(7, 8, 100), array(8, 8, 100)
    plain = loss(student, teacher, torch.arange(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher, torch.arange(8)), plain)


@losses()
def test_empty_batch_is_zero_with_a_graph(loss):
    student = torch.zeros(0, 10, requires_grad=True)
    value = loss(student, torch.zeros(0, 10), torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value.shape == () and value.item() == 0 and student.grad.shape == (0, 10)


@losses()
def test_no_gradient_to_the_teacher_and_none_changed(loss):
    student, teacher = array(9, 6, 10).requires_grad_(), array(10, 6, 10).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    loss(student, teacher, torch.arange(6)).backward()
    assert teacher.grad is None and student.grad.any()
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@pytest.mark.parametrize("loss", [kd, dkd, bckd])
def test_zero_where_both_agree(loss):
    student = array(9, 6, 100).requires_grad_()
    value = loss(student, student.detach().clone(), torch.tensor([3, 0, 99, 57, 41, 41]))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5) and student.grad.abs().max() < 1e-6


@losses(but=[bckd])
def test_logits_may_be_shifted(loss):
    student, teacher, target = array(10, 6, 20).double(), array(11, 6, 20).double(), torch.arange(6)
    shifted = loss(student + 5, teacher - 7, target)
    assert shifted.item() == pytest.approx(loss(student, teacher, target).item(), rel=1e-11)


@losses(but=[dist])
def test_batch_is_a_mean(loss):
    student, teacher, target = array(12, 6, 20).double(), array(13, 6, 20).double(), torch.arange(6)
    single = [loss(student[i : i + 1], teacher[i : i + 1], target[i : i + 1]).item() for i in range(6)]
    assert loss(student, teacher, target).item() == pytest.approx(sum(single) / 6, rel=1e-12)


@pytest.mark.parametrize("loss", [dkd, nkd, rld])
def test_one_class_is_refused(loss):
    with pytest.raises(ValueError, match="other classes"):
        loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
