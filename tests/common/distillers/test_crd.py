"""CRD's memory: banks, Z, classes."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from d2distill.common.outputs import Batch, Outputs, TrainingData
from tests.common.distillers.single_method import build
from tests.goldens.fill import array

SAMPLES, CLASSES = 40, 4
LABELS = torch.arange(SAMPLES) % CLASSES


def outputs(n, seed=1):
    return Outputs(pooled=array(seed, n, 6).requires_grad_()), Outputs(pooled=array(seed + 100, n, 9))


def make(labels=LABELS, num_samples=SAMPLES, seed=5, **changed):
    torch.manual_seed(seed)
    return build("CRD", *outputs(2), TrainingData(num_samples, labels), **{"K": 7, "FEAT_DIM": 8, **changed})


def step(method, index, seed=1, contrast=None):
    index = torch.as_tensor(index, dtype=torch.long)
    extras = {} if contrast is None else {"contrast_index": contrast}
    return method(*outputs(len(index), seed), Batch(index=index, extras=extras))


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


def test_a_step_by_hand():
    """With what the loader drew, samples of the own class among it, in the place of what the method would draw."""
    method, index, contrast = make(), [3, 8, 9], torch.randint(SAMPLES, (3, 5))
    banks, state = (method.bank_student.clone(), method.bank_teacher.clone()), torch.get_rng_state()
    of_student, of_teacher = embedded(method, index)
    expected, fixed = 0.0, []
    for embedding, bank in ((of_student, banks[1]), (of_teacher, banks[0])):
        scores = torch.stack([(embedding[i] @ bank[contrast[i]].T / 0.07).exp() for i in range(3)]).double()
        fixed.append(scores.mean().item() * SAMPLES)
        expected += transcribed(scores / fixed[-1], SAMPLES)
    assert step(method, index, contrast=contrast).item() == pytest.approx(expected, rel=1e-5)
    assert method.z.tolist() == pytest.approx(fixed, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    for bank, old, embedding in zip(
        (method.bank_student, method.bank_teacher), banks, (of_student, of_teacher), strict=True
    ):
        new = F.normalize(0.5 * old[index] + 0.5 * embedding)
        torch.testing.assert_close(bank[index], new, rtol=0, atol=1e-6)
        rest = [i for i in range(SAMPLES) if i not in index]
        assert torch.equal(bank[rest], old[rest])


def test_momentum_and_the_last_of_a_repeated_sample():
    method, index = make(MOMENTUM=0.8), [7, 2, 7]
    old, (embedding, _) = method.bank_student.clone(), embedded(method, index)
    step(method, index)
    new = F.normalize(0.8 * old[[7, 2]] + 0.2 * embedding[[2, 1]])
    torch.testing.assert_close(method.bank_student[[7, 2]], new, rtol=0, atol=1e-6)


def test_z_is_that_of_the_first_batch_with_samples():
    method = make()
    step(method, [])
    assert method.z.tolist() == [-1, -1]
    step(method, [0, 1, 2])
    first = method.z.clone()
    step(method, [3, 4], seed=2)
    assert first.min() > 0 and torch.equal(method.z, first)


def test_gradcheck():
    method, contrast = make().double(), torch.randint(SAMPLES, (3, 6))
    student, teacher = (o.pooled.detach().double() for o in outputs(3))
    method.z.copy_(torch.tensor([30.0, 50.0]))
    batch = Batch(index=torch.arange(3), extras={"contrast_index": contrast})

    def loss(pooled):
        return copy.deepcopy(method)(Outputs(pooled=pooled), Outputs(pooled=teacher), batch)

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


def drawn(method, index, monkeypatch):
    """The contrast of one step."""
    seen, original = [], type(method)._contrast

    def spy(self, *args):
        seen.append(original(self, *args))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(type(method), "_contrast", spy)
        step(method, index)
    return seen[0]


@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_negatives_are_of_other_classes(monkeypatch, mode):
    method, index = make(K=300, MODE=mode), torch.tensor([5, 17, 30], dtype=torch.int32)
    contrast, of_class = drawn(method, index, monkeypatch), LABELS[index][:, None]
    assert (LABELS[contrast[:, 1:]] != of_class).all() and (LABELS[contrast[:, :1]] == of_class).all()
    assert (mode == "exact") == torch.equal(contrast[:, 0], index.long())
    assert set(contrast[0, 1:].tolist()) == {j for j in range(SAMPLES) if LABELS[j] != LABELS[5]}


def test_without_labels_each_sample_is_a_class_of_its_own(monkeypatch):
    contrast = drawn(make(labels=None, K=600), [0, 4], monkeypatch)
    assert contrast[:, 0].tolist() == [0, 4]
    assert [set(row.tolist()) for row in contrast[:, 1:]] == [set(range(SAMPLES)) - {own} for own in (0, 4)]


def test_the_memory_follows_the_seed():
    one, same, other = make(seed=5), make(seed=5), make(seed=6)
    for bank in ("bank_student", "bank_teacher"):
        assert torch.equal(getattr(one, bank), getattr(same, bank))
        assert not torch.isclose(getattr(one, bank), getattr(other, bank)).any()
    assert not torch.isclose(one.bank_student, one.bank_teacher).any()
    # Nor are they the numbers that the embeddings begin with.
    weight, bank = (x.flatten()[:48] / x.abs().max() for x in (one.embed_student.weight, one.bank_student))
    assert not torch.isclose(weight, bank, atol=0.05).all()


def test_the_memory_draws_nothing_from_the_methods_after_it():
    after = []
    for num_samples in (40, 400):
        make(labels=None, num_samples=num_samples)
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_rows_of_the_memory_are_uniform():
    bank, bound = make(labels=None, num_samples=2000, FEAT_DIM=128).bank_student, math.sqrt(3 / 128)
    assert bank.abs().max() <= bound and bank.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": None, "num_samples": None}, "their number is None; 2 or more"),
        ({"labels": None, "num_samples": 1}, "their number is 1; 2 or more"),
        ({"labels": LABELS[:-1]}, "all 40 samples, and more than one, but has 39 labels of 4 classes"),
        ({"labels": torch.full((SAMPLES,), 3)}, "more than one, but has 40 labels of 1 classes"),
        ({"labels": None, "MODE": "relax"}, 'MODE "relax" needs the classes of the training samples; take "exact"'),
        ({"MODE": "loose"}, 'MODE "exact" or "relax", not 7 and \'loose\''),
        ({"K": 0}, "K from 1 to 10,000,000"),
    ],
)
def test_what_it_cannot_be_built_with(changed, message):
    with pytest.raises(ValueError, match=message):
        make(**changed)


def test_a_step_needs_positions():
    with pytest.raises(ValueError, match="position of each sample"):
        make()(*outputs(2), Batch())
