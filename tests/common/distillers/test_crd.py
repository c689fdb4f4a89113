"""CRD's memory: banks, Z, checkpoints."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from d2distill.common.distillers import Context
from d2distill.common.distillers._contrast import contrast_logits, last_of_each
from d2distill.common.outputs import Outputs
from tests.common.distillers.single_method import build, settings
from tests.goldens.fill import array

SAMPLES, CLASSES = 40, 4
LABELS = torch.arange(SAMPLES) % CLASSES


def outputs(n, seed=1, scale=1.0, dtype=torch.float32):
    student, teacher = array(seed, n, 6, scale=scale), array(seed + 100, n, 9, scale=scale)
    return Outputs(pooled=student.to(dtype).requires_grad_()), Outputs(pooled=teacher.to(dtype).requires_grad_())


def make(num_samples=SAMPLES, **changed):
    torch.manual_seed(5)
    return build("CRD", *outputs(2), num_samples, **{"K": 7, "FEAT_DIM": 8, "WEIGHT": 1.0, **changed})


def step(method, index, seed=1, contrast=None, **kwargs):
    index = torch.as_tensor(index, dtype=torch.long)
    student, teacher = outputs(len(index), seed, **kwargs)
    return method(student, teacher, LABELS[index], Context(1.0, index, contrast))["loss_crd"]


def embedded(method, index, seed=1):
    student, teacher = outputs(len(index), seed)
    pairs = (method.embed_student, student), (method.embed_teacher, teacher)
    return [F.normalize(embed(side.pooled)).detach() for embed, side in pairs]


def transcribed(scores, num_samples, eps=1e-7):
    total = 0.0
    for positive, *negatives in scores.tolist():
        c = len(negatives) / num_samples
        total -= math.log(positive / (positive + c + eps)) + sum(math.log(c / (p + c + eps)) for p in negatives)
    return total / len(scores)


@pytest.mark.parametrize("num_samples", [30, 3000])
def test_products_either_way(num_samples):
    bank, contrast = array(2, num_samples, 8).double(), torch.randint(num_samples, (5, 20))
    embedding = array(3, 5, 8).double().requires_grad_()
    value = contrast_logits(embedding, bank, contrast)
    expected = (embedding[:, None] * bank[contrast]).sum(2)
    assert torch.allclose(value, expected)
    weight = array(4, 5, 20).double()
    (wanted,) = torch.autograd.grad((weight * expected).sum(), embedding)
    # As in a step, where the bank is updated before the backward pass.
    bank.zero_()
    (got,) = torch.autograd.grad((weight * value).sum(), embedding)
    assert torch.allclose(got, wanted)


def test_a_step_by_hand():
    method, index, contrast = make(), [3, 8, 9], torch.randint(SAMPLES, (3, 5))
    banks = method.bank_student.clone(), method.bank_teacher.clone()
    of_student, of_teacher = embedded(method, index)
    expected = 0.0
    for embedding, bank in ((of_student, banks[1]), (of_teacher, banks[0])):
        scores = torch.stack([(embedding[i] @ bank[contrast[i]].T / 0.07).exp() for i in range(3)]).double()
        z = scores.mean() * SAMPLES
        expected += transcribed(scores / z, SAMPLES)
    value = step(method, index, contrast=contrast)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    for bank, old, embedding in zip(
        (method.bank_student, method.bank_teacher), banks, (of_student, of_teacher), strict=True
    ):
        for i, sample in enumerate(index):
            new = 0.5 * old[sample] + 0.5 * embedding[i]
            assert torch.allclose(bank[sample], new / new.norm(), atol=1e-6)
        rest = [i for i in range(SAMPLES) if i not in index]
        assert torch.equal(bank[rest], old[rest])


def test_momentum_and_the_last_of_a_repeated_sample():
    method, index = make(MOMENTUM=0.8), [7, 2, 7]
    old, (embedding, _) = method.bank_student.clone(), embedded(method, index)
    step(method, index)
    for sample, row in ((7, 2), (2, 1)):
        new = 0.8 * old[sample] + 0.2 * embedding[row]
        assert torch.allclose(method.bank_student[sample], new / new.norm(), atol=1e-6)


def test_last_of_each():
    # By hand, since only a device writes repeated rows in any order.
    assert last_of_each(torch.tensor([7, 2, 7, 5, 2, 7])).tolist() == [5, 4, 5, 3, 4, 5]


def test_z_is_that_of_the_first_batch():
    method, contrast = make(), torch.randint(SAMPLES, (3, 5))
    assert method.z.tolist() == [-1, -1]
    of_student, of_teacher = embedded(method, [0, 1, 2])
    expected = [
        (embedding[:, None] * bank[contrast]).sum(2).div(0.07).exp().mean().item() * SAMPLES
        for embedding, bank in ((of_student, method.bank_teacher), (of_teacher, method.bank_student))
    ]
    step(method, [], contrast=contrast[:0])
    assert method.z.tolist() == [-1, -1]
    step(method, [0, 1, 2], contrast=contrast)
    assert method.z.tolist() == pytest.approx(expected, rel=1e-5)
    first = method.z.clone()
    step(method, [3, 4], seed=2)
    assert torch.equal(method.z, first)


def test_contrast_index_is_used_as_it_is():
    # Positives and negatives that the method would never draw: others of the own class, and of another number.
    contrast, method = torch.tensor([[4, 8, 12], [4, 5, 6]]), make()
    method.set_labels(LABELS)
    before = torch.get_rng_state()
    step(method, [0, 1], contrast=contrast)
    assert torch.equal(torch.get_rng_state(), before)
    banks, (of_student, of_teacher) = make(), embedded(method, [0, 1])
    scores = torch.stack(
        [
            (e[:, None] * b[contrast]).sum(2) / 0.07
            for e, b in ((of_student, banks.bank_teacher), (of_teacher, banks.bank_student))
        ]
    )
    for side in range(2):
        assert method.z[side].item() == pytest.approx(scores[side].exp().mean().item() * SAMPLES, rel=1e-5)


def test_both_embeddings_are_trained_and_the_teacher_is_not():
    method = make()
    student, teacher = outputs(4)
    method(student, teacher, LABELS[:4], Context(1.0, torch.arange(4)))["loss_crd"].backward()
    assert teacher.pooled.grad is None and student.pooled.grad.any()
    assert all(p.grad.any() for p in method.parameters())


def test_gradcheck():
    method, contrast = make().double(), torch.randint(SAMPLES, (3, 6))
    student, teacher = (o.pooled.detach().double() for o in outputs(3))
    method.z.copy_(torch.tensor([30.0, 50.0]))

    def loss(pooled):
        fresh = copy.deepcopy(method)
        return fresh(
            Outputs(pooled=pooled), Outputs(pooled=teacher), LABELS[:3], Context(1.0, torch.arange(3), contrast)
        )["loss_crd"]

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_huge_features_under_autocast(dtype, autocast):
    values = []
    for enabled in (False, True):
        method = make()
        student, teacher = outputs(5, scale=1e4, dtype=dtype)
        torch.manual_seed(1)
        with torch.autocast("cpu", autocast, enabled=enabled):
            loss = method(student, teacher, LABELS[:5], Context(1.0, torch.arange(5)))["loss_crd"]
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and student.pooled.grad.isfinite().all()
        assert method.bank_student.dtype == torch.float32 and method.bank_student.isfinite().all()
        values.append(loss)
    assert torch.equal(*values)


@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_empty_batch_is_zero_with_a_graph(mode):
    method = make(MODE=mode)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    student, teacher = outputs(0)
    empty = torch.zeros(0, dtype=torch.long)
    value = method(student, teacher, empty, Context(1.0, empty))["loss_crd"]
    value.backward()
    assert value.item() == 0 and student.pooled.grad.shape == (0, 6)
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_continues_bit_for_bit(tmp_path, known, mode):
    def train(method, steps):
        optimizer = torch.optim.SGD(method.parameters(), 0.1)
        losses = []
        for t in steps:
            torch.manual_seed(t)
            optimizer.zero_grad()
            loss = step(method, torch.randperm(SAMPLES)[:6], seed=t)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    method = make(MODE=mode)
    if known:
        method.set_labels(LABELS)
    train(method, range(3))
    torch.save(method.state_dict(), tmp_path / "c.pth")
    going_on = train(method, range(3, 6))
    other = make(MODE=mode, K=7)
    if known:
        other.set_labels(LABELS)
    other.load_state_dict(torch.load(tmp_path / "c.pth", weights_only=True))
    assert train(other, range(3, 6)) == going_on
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in method.state_dict().items())


def test_banks_begin_equal_whatever_the_seed():
    first = make()
    torch.manual_seed(99)
    second = build("CRD", *outputs(2), SAMPLES, K=7, FEAT_DIM=8)
    assert torch.equal(first.bank_student, second.bank_student)
    assert torch.equal(first.bank_teacher, second.bank_teacher)
    assert not torch.equal(first.bank_student, first.bank_teacher)
    large = build("CRD", *outputs(2), 2000)
    bound = 1 / math.sqrt(128 / 3)
    assert large.bank_student.abs().max() <= bound and large.bank_student.std().item() == pytest.approx(
        bound / math.sqrt(3), rel=0.01
    )


def test_what_it_needs():
    with pytest.raises(ValueError, match="number is None"):
        build("CRD", *outputs(2))
    with pytest.raises(ValueError, match="2 or more"):
        build("CRD", *outputs(2), 1)
    with pytest.raises(ValueError, match="MODE"):
        make(MODE="loose")
    with pytest.raises(ValueError, match="K >= 1"):
        make(K=0)
    method, (student, teacher) = make(), outputs(2)
    with pytest.raises(ValueError, match="position of each sample"):
        method(student, teacher, LABELS[:2], Context(1.0))
    with pytest.raises(ValueError, match="contrast_index"):
        step(method, [0, 1], contrast=torch.zeros(2, 1, dtype=torch.long))


def test_published_defaults():
    assert settings("CRD") == {
        "WEIGHT": 0.8, "WARMUP": 0, "TEACHER": 0,
        "K": 16384, "T": 0.07, "MOMENTUM": 0.5, "FEAT_DIM": 128, "MODE": "exact",
    }  # fmt: skip
