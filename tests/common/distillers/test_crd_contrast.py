"""What CRD draws: never of the own class, uniform over all others; and its table of classes."""

import pytest
import torch

from d2distill.common.distillers import Context
from d2distill.common.distillers._contrast import sample_negatives
from d2distill.common.outputs import Outputs
from tests.common.distillers.test_crd import LABELS, SAMPLES, make, outputs, step

# Imbalanced, unsorted, with numbers left out.
TABLE = torch.tensor([7, 0, 0, 3, 0, 7, 0, 0, 3, 0, 0, 0])


def draw(labels, index, num_negatives, exact=True):
    index = torch.as_tensor(index)
    order = labels.argsort(stable=True)
    return sample_negatives(labels[index], order, labels[order], num_negatives, index if exact else None)


def chi_square(drawn, allowed):
    counts = torch.bincount(drawn, minlength=max(allowed) + 1)
    expected = len(drawn) / len(allowed)
    assert counts.sum() == counts[allowed].sum()
    return sum((counts[a].item() - expected) ** 2 / expected for a in allowed)


@pytest.mark.parametrize("index", range(len(TABLE)))
def test_negatives_are_uniform_over_the_other_classes(index):
    torch.manual_seed(0)
    contrast = draw(TABLE, [index], 20000)
    allowed = [j for j in range(len(TABLE)) if TABLE[j] != TABLE[index]]
    assert contrast[0, 0] == index
    # 99.99 % of the distribution with 9 degrees of freedom lie below 33.7.
    assert chi_square(contrast[0, 1:], allowed) < 33.7


@pytest.mark.parametrize("index", [0, 1, 3])
def test_relaxed_positives_are_uniform_over_the_own_class(index):
    torch.manual_seed(0)
    contrast = draw(TABLE, [index] * 4000, 2, exact=False)
    own = [j for j in range(len(TABLE)) if TABLE[j] == TABLE[index]]
    assert chi_square(contrast[:, 0], own) < 33.7
    assert (TABLE[contrast[:, 1:]] != TABLE[index]).all()


def test_a_batch_draws_for_each_sample():
    torch.manual_seed(0)
    contrast = draw(TABLE, range(12), 500)
    assert contrast.shape == (12, 501) and (TABLE[contrast[:, 1:]] != TABLE[:, None]).all()
    assert not torch.equal(contrast[1, 1:], contrast[2, 1:])


def spied(method, index, monkeypatch):
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
def test_a_step_with_known_labels(monkeypatch, mode):
    method, index = make(K=300, MODE=mode), torch.tensor([5, 17, 30])
    method.set_labels(LABELS)
    contrast = spied(method, index, monkeypatch)
    assert (LABELS[contrast[:, 1:]] != LABELS[index][:, None]).all()
    assert (LABELS[contrast[:, 0]] == LABELS[index]).all() and (mode == "relax" or torch.equal(contrast[:, 0], index))
    assert set(contrast[0, 1:].tolist()) == {j for j in range(SAMPLES) if LABELS[j] != LABELS[5]}


def test_labels_are_learned_from_the_batches(monkeypatch):
    method = make(K=600)
    assert (method.labels == -1).all()
    # All but the sample itself may be of another class, until they are seen.
    contrast = spied(method, [0, 4, 1], monkeypatch)
    assert method.labels[[0, 4, 1]].tolist() == [0, 0, 1] and (method.labels == -1).sum() == SAMPLES - 3
    assert set(contrast[0, 1:].tolist()) == set(range(SAMPLES)) - {0, 4}
    assert set(contrast[2, 1:].tolist()) == set(range(SAMPLES)) - {1}
    step(method, list(range(SAMPLES)))
    assert torch.equal(method.labels, LABELS)
    assert set(spied(method, [0], monkeypatch)[0, 1:].tolist()) == {j for j in range(SAMPLES) if j % 4}


def test_a_table_that_was_set_is_kept():
    method, (student, teacher) = make(), outputs(2)
    method.set_labels(LABELS.tolist())
    method(student, teacher, torch.tensor([3, 3]), Context(1.0, torch.tensor([0, 1])))
    assert torch.equal(method.labels, LABELS)


def test_a_loaded_table_is_sorted_again(monkeypatch):
    method, other = make(K=300), make(K=300)
    method.set_labels(LABELS)
    other.set_labels(LABELS.flip(0))
    other.load_state_dict(method.state_dict())
    contrast = spied(other, torch.tensor([5, 17, 30]), monkeypatch)
    assert (LABELS[contrast[:, 1:]] != LABELS[[5, 17, 30]][:, None]).all()
    other.load_state_dict(make().state_dict())
    step(other, [0, 1])
    assert other.labels.tolist()[:3] == [0, 1, -1]


def test_labels_that_do_not_fit():
    method = make()
    with pytest.raises(ValueError, match="one class number per training sample"):
        method.set_labels(LABELS[:-1])
    with pytest.raises(ValueError, match="one class number per training sample"):
        method.set_labels(LABELS.float())
    with pytest.raises(ValueError, match="all training samples are of class 3"):
        method.set_labels(torch.full((SAMPLES,), 3))
    assert (method.labels == -1).all()


def test_index_may_be_of_another_integer_type():
    method, (student, teacher) = make(), outputs(2)
    ctx = Context(1.0, torch.tensor([0, 1], dtype=torch.int32))
    assert method(student, Outputs(pooled=teacher.pooled), LABELS[:2].int(), ctx)["loss_crd"].isfinite()
