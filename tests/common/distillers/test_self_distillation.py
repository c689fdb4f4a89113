"""USKD, which has no teacher."""

import pytest
import torch

from d2distill.common.distillers import DISTILLERS, Context, uskd_loss
from d2distill.common.outputs import Outputs, OutputSpec
from tests.common.distillers.single_method import build, settings
from tests.goldens.fill import array


def outputs(n, scale=1.0, dtype=torch.float32):
    maps = [array(7, n, 4, 8, 8, scale=scale), array(8, n, 6, 4, 4, scale=scale), array(9, n, 8, 2, 2, scale=scale)]
    return Outputs(array(10, n, 5, scale=scale).to(dtype), [m.to(dtype).requires_grad_() for m in maps])


def test_without_a_teacher():
    student, target = outputs(6), torch.tensor([0, 1, 2, 3, 4, 0])
    method = build("USKD", student, None)
    (value,) = method(student, None, target, Context()).values()
    weak = student.feats[1].mean((2, 3)) @ method.head.weight.T + method.head.bias
    expected = uskd_loss(student.logits, weak, target, 1.0, 0.1, 0.005)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    value.backward()
    # The weak classifier is trained, and trains what lies before it.
    assert method.head.weight.grad.any() and student.feats[1].grad.any() and student.feats[2].grad is None


def test_a_teacher_is_ignored():
    student, teacher = outputs(2), Outputs(pooled=torch.zeros(2, 3))
    method, target = build("USKD", student, teacher), torch.tensor([0, 1])
    both = [method(student, t, target, Context())["loss_uskd"] for t in (None, teacher)]
    assert torch.equal(*both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_features_under_autocast(dtype):
    student = outputs(3, 1e4, dtype)
    method = build("USKD", student, None)
    plain = method(student, None, torch.tensor([0, 1, 2]), Context())["loss_uskd"]
    with torch.autocast("cpu", torch.bfloat16):
        value = method(student, None, torch.tensor([0, 1, 2]), Context())["loss_uskd"]
    value.backward()
    assert torch.equal(value, plain) and value.isfinite() and student.feats[1].grad.isfinite().all()


def test_empty_batch_is_zero_with_a_graph():
    student = outputs(0)
    value = build("USKD", student, None)(student, None, torch.zeros(0, dtype=torch.long), Context())["loss_uskd"]
    value.backward()
    assert value.item() == 0 and student.feats[1].grad.shape == (0, 6, 4, 4)


def test_what_it_needs():
    with pytest.raises(ValueError, match="the feats of the student"):
        DISTILLERS.get("USKD")(settings("USKD"), OutputSpec(10))
    with pytest.raises(ValueError, match="map before the last"):
        DISTILLERS.get("USKD")(settings("USKD"), OutputSpec(10, feats=((3,),)))
    assert settings("USKD") == {"WEIGHT": 1.0, "WARMUP": 0, "TEACHER": 0, "ALPHA": 1.0, "BETA": 0.1, "MU": 0.005}
