"""Losses and gradients of the reference code, in tests/goldens/losses.json, on inputs as large as a network's."""

import pytest
import torch

from d2distill.common import distillers as d
from tests.goldens.fill import array

TARGET = torch.tensor([3, 0, 99, 57, 41, 41])
STUDENT_SHAPES = [(8, 16, 16), (16, 8, 8), (32, 4, 4)]


def logits(seed, scale=3):
    # In two steps, as for the goldens: another rounding is another input.
    return scale / 3 * array(seed, 6, 100, scale=3)


def maps(seed, *shapes, positive=True):
    feats = [array(seed + i, 4, *shape) for i, shape in enumerate(shapes)]
    return [feat.relu() + 0.01 for feat in feats] if positive else feats


# The reference computes in fp32. Where a loss is a difference of nearly equal numbers its own rounding shows: the
# formula in float64 is 9e-6 (sp) and 5e-6 (pkt) away from the golden.
@pytest.mark.parametrize(
    ("golden", "loss", "student", "teacher", "rel", "rel_grad"),
    [
        ("kd_T1", lambda s, t: d.kd_loss(*s, *t, 1), [logits(21)], [logits(22)], 2e-6, 1e-6),
        ("kd_T4", lambda s, t: d.kd_loss(*s, *t, 4), [logits(21)], [logits(22)], 2e-6, 1e-6),
        *[
            (
                f"dkd_{name}",
                lambda s, t, w=w: d.dkd_loss(*s, *t, TARGET, *w),
                [logits(21, x)],
                [logits(22, x)],
                2e-6,
                1e-6,
            )
            for name, w, x in [
                ("1_8_4.0", (1, 8, 4), 3),
                ("1_0.5_1.0", (1, 0.5, 1), 3),
                ("1_0.25_1.0", (1, 0.25, 1), 3),
                ("2.5_0.0_2.0", (2.5, 0, 2), 3),
                ("confident", (1, 8, 4), 30),
            ]
        ],
        ("at_p2", d.at_loss, maps(30, *STUDENT_SHAPES), maps(33, (8, 8, 8), (24, 8, 8), (32, 8, 8)), 2e-6, 1e-6),
        ("sp", d.sp_loss, maps(30, *STUDENT_SHAPES), maps(33, (8, 8, 8), (24, 8, 8), (32, 8, 8)), 1.5e-5, 1e-4),
        ("nst", d.nst_loss, maps(30, *STUDENT_SHAPES), maps(36, (8, 8, 8), (16, 8, 8), (32, 8, 8)), 2e-6, 2e-6),
        ("kdsvd", d.kdsvd_loss, maps(30, *STUDENT_SHAPES), maps(39, *STUDENT_SHAPES), 5e-6, 1e-5),
        ("hcl", d.hcl_loss, maps(30, *STUDENT_SHAPES), maps(60, *STUDENT_SHAPES, positive=False), 2e-6, 1e-6),
        ("pkt", lambda s, t: d.pkt_loss(*s, *t), [array(50, 8, 64)], [array(51, 8, 128)], 1e-5, 1e-6),
        ("rkd", lambda s, t: d.rkd_loss(*s, *t), [array(50, 8, 64)], [array(51, 8, 128)], 2e-6, 1e-6),
    ],
)
def test_equals_the_reference(loss_goldens, golden, loss, student, teacher, rel, rel_grad):
    student = [s.clone().requires_grad_() for s in student]
    value = loss(student, teacher)
    grads = torch.autograd.grad(value, student)
    assert value.item() == pytest.approx(loss_goldens[golden]["loss"], rel=rel)
    assert [grad.norm().item() for grad in grads] == pytest.approx(loss_goldens[golden]["grad"], rel=rel_grad)
