"""Properties that every loss on feature maps or embeddings has: gradients, extremes, precision, small batches."""

import pytest
import torch

from d2distill.common.distillers import (
    at_loss,
    fitnet_loss,
    hcl_loss,
    kdsvd_loss,
    nst_loss,
    ofd_loss,
    pkt_loss,
    rkd_loss,
    sp_loss,
    vid_loss,
)
from tests.goldens.fill import array


def fitnet(student, teacher):
    return fitnet_loss(student[0], teacher[0])


def vid(student, teacher):
    return vid_loss(student[0], teacher[0], torch.full((teacher[0].shape[1],), 5.0))


def ofd(student, teacher):
    return ofd_loss(student, teacher, [torch.full((t.shape[1],), -0.5) for t in teacher])


def on_first(loss):
    def on_lists(student, teacher):
        return loss(student[0].flatten(1), teacher[0].flatten(1))

    on_lists.__name__ = loss.__name__
    return on_lists


pkt, rkd = on_first(pkt_loss), on_first(rkd_loss)
ALL = [at_loss, nst_loss, sp_loss, kdsvd_loss, hcl_loss, fitnet, vid, ofd, pkt, rkd]
LOSSES = pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.__name__)


def maps(seed, batch=4, scale=1.0, dtype=torch.float32, channels=6):
    return [(scale * array(seed + i, batch, channels, size, size)).to(dtype) for i, size in enumerate((4, 2))]


def trainable(feats):
    return [feat.requires_grad_() for feat in feats]


@LOSSES
def test_gradcheck(loss):
    student, teacher = (maps(seed, batch=3, dtype=torch.float64, channels=3) for seed in (10, 20))
    used = trainable(student[:1] if loss in (fitnet, vid, pkt, rkd) else student)
    # fast_mode: along one random direction, which every wrong entry shows in.
    assert torch.autograd.gradcheck(
        lambda *feats: loss(list(feats), teacher), used, fast_mode=True, check_undefined_grad=False
    )


@LOSSES
def test_no_gradient_to_the_teacher(loss):
    student, teacher = trainable(maps(10)), trainable(maps(20))
    loss(student, teacher).backward()
    assert all(feat.grad is None for feat in teacher)
    assert student[0].grad.abs().sum() > 0


@LOSSES
def test_nothing_to_learn_from_an_equal(loss):
    student = trainable(maps(10))
    value = loss(student, [feat.detach().clone() for feat in student])
    value.backward()
    expected = 0.5 * torch.tensor(5.0).log().item() if loss is vid else 0.0
    assert value.item() == pytest.approx(expected, abs=2e-6)
    assert student[0].grad.abs().max() < 1e-5


@LOSSES
def test_order_of_the_samples_does_not_matter(loss):
    student, teacher = maps(10, dtype=torch.float64), maps(20, dtype=torch.float64)
    order = [2, 0, 3, 1]
    shuffled = loss([s[order] for s in student], [t[order] for t in teacher])
    assert shuffled.item() == pytest.approx(loss(student, teacher).item(), rel=1e-9)
    mispaired = loss([s[order] for s in student], teacher)
    assert mispaired.item() != pytest.approx(loss(student, teacher).item(), rel=1e-3)


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_finite_for_huge_maps(loss, dtype, autocast):
    student, teacher = trainable(maps(10, scale=1e4, dtype=dtype)), maps(20, scale=1e4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(student, teacher)
    assert value.dtype == torch.float32 and value.shape == ()
    assert value.isfinite() and value > 0
    if dtype == torch.float16 and loss in (hcl_loss, fitnet, vid, ofd):
        value = value * 1e-4  # these grow with the square of the maps; gradients have to fit into fp16
    value.backward()
    assert all(feat.grad.isfinite().all() for feat in student if feat.grad is not None)


@LOSSES
def test_autocast_changes_no_digit(loss):
    student, teacher = maps(10), maps(20)
    plain = loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher), plain)


@LOSSES
def test_half_precision_costs_only_the_input_its_digits(loss):
    student, teacher = maps(10, dtype=torch.bfloat16), maps(20, dtype=torch.bfloat16)
    exact = loss([s.double() for s in student], [t.double() for t in teacher]).item()
    assert loss(student, teacher).item() == pytest.approx(exact, rel=1e-5, abs=3e-8)


@LOSSES
def test_batch_of_one(loss):
    student, teacher = trainable(maps(10, batch=1)), maps(20, batch=1)
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite() and student[0].grad.isfinite().all()
    if loss in (sp_loss, pkt, rkd):  # relations between samples: there are none
        assert value.item() == pytest.approx(0, abs=1e-12) and student[0].grad.abs().max() < 1e-6
    else:
        assert value != 0


@LOSSES
def test_empty_batch_is_zero_with_a_graph(loss):
    student = trainable(maps(10, batch=0))
    value = loss(student, maps(20, batch=0))
    value.backward()
    assert value.shape == () and value.item() == 0 and student[0].grad.shape == student[0].shape


@LOSSES
def test_dead_maps(loss):
    """Zeros, of one sample or one channel: finite, and no gradient that would throw the student off."""
    student, teacher = maps(10), maps(20)
    student[0][1], student[0][:, 2], teacher[0][2], teacher[0][:, 3] = 0, 0, 0, 0
    value = loss(trainable(student), teacher)
    value.backward()
    bound = 1e6 if loss is pkt else 1e3  # 1 / eps by its definition
    assert value.isfinite() and all(s.grad is None or s.grad.abs().max() < bound for s in student)
    value = loss(trainable([torch.zeros_like(s) for s in student]), [torch.zeros_like(t) for t in teacher])
    value.backward()
    assert value.isfinite()


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("same", [(0, 1), (0, 1, 2, 3)])
def test_samples_at_the_same_place(squared, same):
    student, teacher = array(50, 4, 6), array(51, 4, 9)
    student[list(same)] = student[0].clone()
    student.requires_grad_()
    value = rkd_loss(student, teacher, squared=squared)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all() and student.grad.abs().max() < 1e3


def test_equal_singular_values_have_no_gradient():
    """One sample's map has no singular vectors of its own; the others keep their gradients."""
    student, teacher = maps(10), maps(20)
    whole = trainable([s[1:].clone() for s in student])
    kdsvd_loss(whole, [t[1:] for t in teacher]).backward()
    student[0][0] = 0
    student[0][0, 0] = torch.eye(4)
    kdsvd_loss(trainable(student), teacher).backward()
    assert student[0].grad.isfinite().all()
    torch.testing.assert_close(student[0].grad[1:] * 4, whole[0].grad * 3)
