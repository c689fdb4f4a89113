"""Negatives: never of the own class, uniform over all others; and products with a memory."""

import pytest
import torch

from d2distill.common.distillers._contrast import contrast_logits, last_of_each, sample_negatives
from tests.goldens.fill import array

# Imbalanced, unsorted, with numbers left out.
TABLE = torch.tensor([7, 0, 0, 3, 0, 7, 0, 0, 3, 0, 0, 0])


def draw(index, num_negatives, exact=True):
    index, order = torch.tensor(index, dtype=torch.long), TABLE.argsort(stable=True)
    return sample_negatives(TABLE[index], order, TABLE[order], num_negatives, index if exact else None)


def chi_square(drawn, allowed):
    counts = torch.bincount(drawn, minlength=max(allowed) + 1)
    expected = len(drawn) / len(allowed)
    assert counts.sum() == counts[allowed].sum()
    return sum((counts[a].item() - expected) ** 2 / expected for a in allowed)


@pytest.mark.parametrize("index", range(len(TABLE)))
def test_negatives_are_uniform_over_the_other_classes(index):
    torch.manual_seed(0)
    contrast = draw([index], 20000)
    assert contrast[0, 0] == index
    # 99.99 % of the distribution with 9 degrees of freedom lie below 33.7.
    assert chi_square(contrast[0, 1:], [j for j in range(len(TABLE)) if TABLE[j] != TABLE[index]]) < 33.7


@pytest.mark.parametrize("index", [0, 1, 3])
def test_relaxed_positives_are_uniform_over_the_own_class(index):
    torch.manual_seed(0)
    contrast = draw([index] * 4000, 2, exact=False)
    assert chi_square(contrast[:, 0], [j for j in range(len(TABLE)) if TABLE[j] == TABLE[index]]) < 33.7
    assert (TABLE[contrast[:, 1:]] != TABLE[index]).all()


def test_a_batch_draws_for_each_sample():
    torch.manual_seed(0)
    contrast = draw(range(12), 500)
    assert contrast.shape == (12, 501) and (TABLE[contrast[:, 1:]] != TABLE[:, None]).all()
    assert not torch.equal(contrast[1, 1:], contrast[2, 1:])
    assert draw([], 5).shape == draw([], 5, exact=False).shape == (0, 6)


@pytest.mark.parametrize("num_samples", [30, 3000])
def test_products_either_way(num_samples):
    bank, contrast = array(2, num_samples, 8).double(), torch.randint(num_samples, (5, 20))
    embedding = array(3, 5, 8).double().requires_grad_()
    value = contrast_logits(embedding, bank, contrast)
    expected = (embedding[:, None] * bank[contrast]).sum(2)
    torch.testing.assert_close(value, expected)
    weight = array(4, 5, 20).double()
    (wanted,) = torch.autograd.grad((weight * expected).sum(), embedding)
    # As in a step, where the bank is updated before the backward pass.
    bank.zero_()
    (got,) = torch.autograd.grad((weight * value).sum(), embedding)
    torch.testing.assert_close(got, wanted)


def test_last_of_each():
    # By hand, since only a device writes repeated rows in any order.
    assert last_of_each(torch.tensor([7, 2, 7, 5, 2, 7])).tolist() == [5, 4, 5, 3, 4, 5]
