"""What each loss on logits has to itself: reference values, identities, published defaults."""

import pytest
import torch
from torch.nn import functional as F

from d2distill.common.distillers import (
    bckd_loss,
    decoupled_kl,
    dist_loss,
    dkd_loss,
    kd_loss,
    nkd_loss,
    rld_loss,
    wttm_loss,
)
from d2distill.common.outputs import Outputs
from tests.common.distillers import formulas
from tests.common.distillers.single_method import build, settings
from tests.goldens.fill import array

TARGET = torch.tensor([3, 0, 99, 57, 41, 41])


@pytest.mark.parametrize(
    ("golden", "loss", "scale"),
    [
        ("kd_T1", lambda s, t: kd_loss(s, t, 1), 3),
        ("kd_T4", lambda s, t: kd_loss(s, t, 4), 3),
        ("dkd_1_8_4.0", lambda s, t: dkd_loss(s, t, TARGET, 1, 8, 4), 3),
        ("dkd_1_0.5_1.0", lambda s, t: dkd_loss(s, t, TARGET, 1, 0.5, 1), 3),
        ("dkd_1_0.25_1.0", lambda s, t: dkd_loss(s, t, TARGET, 1, 0.25, 1), 3),
        ("dkd_2.5_0.0_2.0", lambda s, t: dkd_loss(s, t, TARGET, 2.5, 0, 2), 3),
        ("dkd_confident", lambda s, t: dkd_loss(s, t, TARGET, 1, 8, 4), 30),
    ],
)
def test_equals_the_reference(loss_goldens, golden, loss, scale):
    student, teacher = (scale / 3 * array(seed, 6, 100, scale=3) for seed in (21, 22))
    value = loss(student.requires_grad_(), teacher)
    value.backward()
    assert value.item() == pytest.approx(loss_goldens[golden]["loss"], rel=2e-6)  # both are fp32
    assert student.grad.norm().item() == pytest.approx(loss_goldens[golden]["grad"][0], rel=1e-6)


def test_kd_is_the_sum_of_its_decoupled_parts():
    student, teacher, target = array(3, 6, 100, scale=3), array(4, 6, 100, scale=3), TARGET
    tckd, nckd = decoupled_kl(student, teacher, target, 4.0)
    p_target = F.softmax(teacher / 4, 1).gather(1, target[:, None])[:, 0]
    assert 16 * (tckd + (1 - p_target) * nckd).mean().item() == pytest.approx(
        kd_loss(student, teacher, 4).item(), rel=1e-6
    )


def test_two_classes_leave_nothing_to_the_other_classes():
    _, nckd = decoupled_kl(array(14, 4, 2), array(15, 4, 2), torch.tensor([0, 1, 0, 1]), 1.0)
    assert torch.equal(nckd, torch.zeros(4))


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


def test_wttm_weighs_an_unsure_teacher_most():
    """U is 1 for a certain teacher and C^(1 - gamma) for one that knows nothing: what WEIGHT must be read with."""
    student, unsure, certain = array(31, 1, 100), torch.zeros(1, 100), 1e4 * F.one_hot(torch.tensor([3]), 100)
    for teacher, factor in ((unsure, 100**0.9), (certain, 1.0)):
        divergence = F.kl_div(student.log_softmax(1), (0.1 * teacher).softmax(1), reduction="batchmean").item()
        assert wttm_loss(student, teacher, 0.1).item() == pytest.approx(factor * divergence, rel=1e-5)


@pytest.mark.parametrize("target", [[2, 4, 4, 0, -1, 4], [4, 4, 4, 4, 4, 4], [-1, -1, -1, -1, -1, -1]])
def test_bckd_of_a_dense_detector(target):
    """Background (4 of 4 classes) counts in the sum, not in the divisor; ignored rows (-1) in neither."""
    student, teacher = array(25, 6, 4, scale=3).double().requires_grad_(), array(26, 6, 4, scale=3).double()
    expected = formulas.bckd(student.tolist(), teacher.tolist(), target)
    value = bckd_loss(student, teacher, torch.tensor(target))
    assert value.item() == pytest.approx(expected, rel=1e-12)
    value.backward()
    assert [bool(row.any()) for row in student.grad] == [y >= 0 for y in target]


def test_bckd_sees_a_shift():
    """That a softmax does not see it is what the paper is about."""
    student = array(27, 6, 4)
    assert kd_loss(student - 3, student, 1.0).item() == pytest.approx(0, abs=1e-6)
    assert bckd_loss(student - 3, student, torch.arange(6) % 4) > 0.5


def test_bckd_weighs_with_a_gradient():
    """As in the authors' code: with p the sigmoids, (p_s - p_t) * w + sign(p_s - p_t) * p_s * (1 - p_s) * BCE."""
    student, teacher = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True), torch.tensor([[-1.0]]).double()
    bckd_loss(student, teacher, torch.tensor([0])).backward()
    p_s, p_t = student.detach().sigmoid(), teacher.sigmoid()
    entropy = F.binary_cross_entropy(p_s, p_t)
    assert student.grad.item() == pytest.approx(((p_s - p_t) ** 2 + p_s * (1 - p_s) * entropy).item(), rel=1e-12)


def test_bckd_averages_the_sigmoids_of_several_teachers():
    student, one, two = (array(seed, 6, 4, scale=3).double() for seed in (28, 29, 30))
    method = build("BCKD", Outputs(student), Outputs(one))
    together = method.average([(0.25, one), (0.75, two)])
    torch.testing.assert_close(together.sigmoid(), 0.25 * one.sigmoid() + 0.75 * two.sigmoid())
    huge = method.average([(0.5, torch.tensor([[1e4, -1e4, 1e4]])), (0.5, torch.tensor([[1e4, -1e4, -1e4]]))])
    assert huge.tolist() == [pytest.approx([1e4, -1e4, 0.0], abs=1e-3)]


def test_published_defaults():
    common = {"WEIGHT": 1.0, "WARMUP": 0, "STANDARDIZE": False}
    assert settings("DIST") == {**common, "WEIGHT": 2.0, "BETA": 1.0, "GAMMA": 1.0, "T": 4.0}
    assert settings("NKD") == {**common, "GAMMA": 3.5, "T": 3.0}
    assert settings("RLD") == {**common, "WARMUP": 20, "ALPHA": 1.0, "BETA": 8.0, "ALPHA_T": 1.0, "T": 4.0}
    assert settings("BCKD") == {"WEIGHT": 1.0, "WARMUP": 0}
    assert settings("WTTM") == {**common, "WEIGHT": 3.0, "GAMMA": 0.1}
