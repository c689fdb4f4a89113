"""Order, augmentation and identity of training images, for any sizes, seeds and numbers of processes."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2distill.classification.data import ArrayDataset, DatasetInfo
from d2distill.classification.data.augment import AUGMENTATION_REGISTRY, build_augmentation
from d2distill.classification.data.datasets import ImageSelection
from d2distill.classification.data.loader import EpochBatchSampler
from d2distill.classification.data.replay import Replay

NUMBERED = ("none", "crop", "crop_flip")
RECIPES = (*NUMBERED, "rotate_flip")
SEEDS = st.integers(0, 2**70)


class Run(NamedTuple):
    samples: int
    #: Samples in a step of each process.
    share: int
    processes: int
    epochs: int
    seed: int
    replay: Replay

    @property
    def batch_size(self):
        return self.share * self.processes

    def sampler(self, start=0):
        return EpochBatchSampler(self.samples, self.batch_size, self.epochs, self.seed, start, replay=self.replay)

    def in_processes(self, call):
        """What `call` gives in each process of the job."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("detectron2.utils.comm.get_world_size", lambda: self.processes)
            for rank in range(self.processes):
                patch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
                yield call()


REPLAYS = st.builds(Replay, st.integers(0, 3), SEEDS, st.booleans())
COUNTS = st.integers(1, 5)
RUNS = st.builds(Run, st.integers(1, 40), COUNTS, COUNTS, COUNTS, SEEDS, REPLAYS)


@given(run=RUNS)
def test_an_epoch_has_every_image_once(run):
    batches = list(run.sampler())
    length = len(batches) // run.epochs
    for epoch in range(run.epochs):
        keys = [key for batch in batches[epoch * length : (epoch + 1) * length] for key in batch]
        assert sorted(index for _, index in keys) == list(range(run.samples))
        assert {drawn_as for drawn_as, _ in keys} == {run.replay.epoch(epoch + 1)}


@given(run=RUNS, step=st.integers(0, 200))
def test_a_run_that_is_resumed_has_the_rest(run, step):
    whole = list(run.sampler())
    start = step % (len(whole) + 1)
    assert list(run.sampler(start)) == whole[start:] and len(run.sampler(start)) == len(whole) - start


@given(run=RUNS)
def test_processes_share_the_batches_of_one(run):
    """And their means, weighted, average to the mean over the batch."""
    parts = list(run.in_processes(lambda: list(run.sampler())))
    weights = list(run.in_processes(lambda: [run.sampler().rank_loss_weight(step) for step in range(len(parts[0]))]))
    for step, batch in enumerate(run.sampler()):
        own = [part[step] for part in parts]
        assert own == [batch[rank :: run.processes] or batch[:1] for rank in range(run.processes)]
        means = [
            weight[step] * np.mean([index for _, index in keys]) for weight, keys in zip(weights, own, strict=True)
        ]
        assert np.mean(means) == pytest.approx(np.mean([index for _, index in batch]))


@given(size=st.integers(1, 100), draws=st.tuples(st.integers(0), st.integers(0)))
@pytest.mark.parametrize("name", NUMBERED)
def test_numbers_and_parameters_of_an_augmentation_are_one_to_one(name, size, draws):
    recipe = build_augmentation(name)
    one, two = (draw % recipe.variants(size) for draw in draws)
    assert recipe.number(recipe.numbered(one, size), size) == one
    assert (recipe.numbered(one, size) == recipe.numbered(two, size)) == (one == two)


@given(seed=SEEDS, epoch=st.integers(0, 2**32 - 1), index=st.integers(0, 2**32 - 1), size=st.integers(1, 100))
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_drawn_has_a_number_and_is_that_of_the_batch(name, seed, epoch, index, size):
    recipe = build_augmentation(name)
    params = recipe.draw(np.random.default_rng([seed, epoch, index]), size, size)
    if name in NUMBERED:
        number = int(recipe.number(params, size))
        assert 0 <= number < recipe.variants(size) and recipe.numbered(number, size) == params
    together = recipe.draw_batch(seed, np.array([7, epoch]), np.array([index, index]), size)
    assert {key: together[key][1] for key in params} == params


def test_every_recipe_that_numbers_its_variants_is_tested():
    found = {name for name in AUGMENTATION_REGISTRY.names() if build_augmentation(name).variants(32)}
    assert found - {"own_crop"} == {*NUMBERED}


INFO = DatasetInfo("own", None, 2, (0.0,) * 3, (1.0,) * 3, "cifar", "none", "")
SELECTIONS = st.lists(st.integers(0, 3), min_size=1, max_size=4)


@given(pixels=st.binary(min_size=48, max_size=48), bit=st.integers(0, 8 * 48 - 1), one=SELECTIONS, two=SELECTIONS)
def test_other_pixels_and_other_places_are_other_images(pixels, bit, one, two):
    def digest(content, positions):
        images = torch.tensor([*content], dtype=torch.uint8).reshape(4, 3, 2, 2)
        return ImageSelection(ArrayDataset(INFO, images, [0] * 4, ["a"]), positions).content_digest()

    changed = bytearray(pixels)
    changed[bit // 8] ^= 1 << bit % 8
    assert digest(changed, one) != digest(pixels, one)
    assert (digest(pixels, one) == digest(pixels, two)) == (one == two)
