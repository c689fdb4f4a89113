"""The vectorized generator gives numpy's own numbers."""

import numpy as np
import pytest

from d2distill.classification.data.draws import BatchGenerator

KEYS = np.random.default_rng(0)


def both(seed, count=300):
    """The same samples' numbers from one BatchGenerator and from a numpy generator each."""
    epochs, indices = (KEYS.integers(2 ** int(bits), size=count) for bits in KEYS.integers(1, 33, size=2))
    epochs[:2], indices[:2] = (0, 2**32 - 1), (2**32 - 1, 0)
    own = [np.random.default_rng([seed, int(epoch), int(index)]) for epoch, index in zip(epochs, indices, strict=True)]
    return BatchGenerator(seed, epochs, indices), own


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32, 2**63 + 7, 3**100])
def test_every_number_is_that_of_a_generator_of_its_own(seed):
    for order in (["integers", "integers", "random"], ["uniform", "integers", "random", "integers", "integers"]):
        batch, own = both(seed)
        arguments = {"integers": (int(KEYS.integers(1, 100)),), "random": (), "uniform": (-20.0, 20.0)}
        for name in order:
            numbers = getattr(batch, name)(*arguments[name])
            assert numbers.tolist() == [getattr(rng, name)(*arguments[name]) for rng in own]
        assert not batch.rejected.any()


@pytest.mark.parametrize("high", [2, 9, 2**16, 2**31 + 1, 3 * 2**30, 2**32 - 1])
def test_samples_that_draw_again_are_marked(high):
    batch, own = both(5, count=1000)
    numbers = batch.integers(high)
    expected = np.array([rng.integers(high) for rng in own])
    assert (numbers == expected)[~batch.rejected].all()
    assert abs(batch.rejected.mean() - 2**32 % high / 2**32) < 0.05
