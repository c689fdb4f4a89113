"""uskd_loss and its method, which has no teacher."""

import math

import pytest
import torch

from d2distill.common.distillers import DISTILLERS, Context, uskd_loss, zipf_labels
from d2distill.common.outputs import Outputs, OutputSpec
from tests.common.distillers.formulas import softmax
from tests.common.distillers.single_method import build, settings
from tests.goldens.fill import array


def transcribed_labels(s, w, y):
    log_p, w = [math.log(v) for v in softmax(s)], softmax(w)
    score = [w[c] / (1 - w[y] + 1e-6) + log_p[c] / (1 - log_p[y] + 1e-6) for c in range(len(s))]
    zipf = [1 / (1 + sum(other > score[c] for other in score)) for c in range(len(s))]
    zipf[y] = 0
    return [z / sum(zipf) for z in zipf]


def transcribed(student, weak, target, alpha, beta, mu):
    squares = [softmax(s)[y] ** 2 for s, y in zip(student, target, strict=True)]
    total = 0.0
    for s, w, y, square in zip(student, weak, target, squares, strict=True):
        p, p_weak, z = softmax(s), softmax(w), transcribed_labels(s, w, y)
        total -= alpha * (square + 1 - sum(squares) / len(squares)) * math.log(p[y])
        total -= beta * sum(z[c] * math.log(p[c] / (1 - p[y])) for c in range(len(s)) if c != y)
        total -= mu * sum((0.9 * (c == y) + 0.1 / len(s)) * math.log(p_weak[c]) for c in range(len(s)))
    return total / len(student)


@pytest.mark.parametrize("weights", [(1.0, 0.1, 0.005), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("samples", [1, 6])
def test_equals_the_formula(weights, classes, samples):
    student, weak = array(1, samples, classes, scale=3).double(), array(2, samples, classes, scale=2).double()
    target = torch.arange(samples) % classes
    expected = transcribed(student.tolist(), weak.tolist(), target.tolist(), *weights)
    assert uskd_loss(student, weak, target, *weights).item() == pytest.approx(expected, rel=1e-11, abs=1e-15)
    value = uskd_loss(student.float(), weak.float(), target, *weights)
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_labels_follow_the_rank():
    student, target = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3]]), torch.tensor([1, 3])
    labels = zipf_labels(student, student, target)
    # The target keeps its place among the ranks: it is 2nd in the first sample, 1st in the second.
    expected = [[1, 0, 1 / 3, 1 / 4], [1 / 4, 1 / 3, 1 / 2, 0]]
    for got, row in zip(labels.tolist(), expected, strict=True):
        assert got == pytest.approx([v / sum(row) for v in row], rel=1e-6)


def test_gradients():
    student, weak = array(3, 4, 5).double().requires_grad_(), array(4, 4, 5).double().requires_grad_()
    target = torch.tensor([0, 4, 2, 2])
    # The target's own factor carries no gradient, so that part is checked by hand.
    assert torch.autograd.gradcheck(lambda s, w: uskd_loss(s, w, target, 0.0, 0.1, 0.5), (student, weak))
    (grad,) = torch.autograd.grad(uskd_loss(student, weak, target, 1.0, 0.0, 0.0), student)
    p = student.detach().softmax(1)
    square = p[torch.arange(4), target] ** 2
    factor = (1 + square - square.mean())[:, None] / 4
    assert torch.allclose(grad, factor * (p - torch.nn.functional.one_hot(target, 5)))


@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_finite_for_huge_logits(classes, dtype, autocast):
    student, weak = ((1e4 * array(s, 8, classes).sign()).to(dtype).requires_grad_() for s in (5, 6))
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        value = uskd_loss(student, weak, torch.arange(8) % classes, 1.0, 0.1, 0.005)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite()
    assert student.grad.isfinite().all() and weak.grad.isfinite().all()


def test_refused():
    one, target = torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="other classes"):
        uskd_loss(one, one, target, 1.0, 0.1, 0.005)
    with pytest.raises(ValueError, match="feature of its own"):
        uskd_loss(torch.zeros(4, 3), torch.zeros(2, 3), torch.zeros(4, dtype=torch.long), 1.0, 0.1, 0.005)


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
