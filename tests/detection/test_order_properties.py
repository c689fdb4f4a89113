"""Order of a detector's training images, for any sizes, seeds and numbers of processes."""

from itertools import islice
from typing import NamedTuple

import pytest
from detectron2.data.samplers import TrainingSampler
from hypothesis import given
from hypothesis import strategies as st

from d2distill.detection.data.sampling import TrainBatchSampler

STEPS = 20


class Run(NamedTuple):
    #: Of each image whether it is wide.
    wide: list[bool]
    #: Images in a step of each process.
    share: int
    processes: int
    seed: int
    grouping: bool

    def batches(self, start=0, steps=STEPS):
        groups = [int(wide) for wide in self.wide] if self.grouping else None
        sampler = TrainingSampler(len(self.wide), seed=self.seed)
        return list(islice(TrainBatchSampler(sampler, self.share * self.processes, groups, start), steps))


COUNTS = st.integers(1, 4)
IMAGES = st.lists(st.booleans(), min_size=1, max_size=12)
RUNS = st.builds(Run, IMAGES, COUNTS, COUNTS, st.integers(0, 2**31), st.booleans())


@given(run=RUNS)
def test_an_epoch_has_every_image_once(run):
    """With groups, those of each shape by themselves: a batch has one shape, and none is seen more often."""
    batches = [[index for _, index in batch] for batch in run.batches()]
    kinds = [(True,), (False,)] if run.grouping else [(True, False)]
    for kind in kinds:
        of_kind = [number for number, wide in enumerate(run.wide) if wide in kind]
        order = [index for batch in batches if run.wide[batch[0]] in kind for index in batch]
        assert {*order} <= {*of_kind}
        for start in range(0, len(order) - len(of_kind), max(len(of_kind), 1)):
            assert sorted(order[start : start + len(of_kind)]) == of_kind


@given(run=RUNS, start=st.integers(0, STEPS))
def test_a_run_that_is_resumed_has_the_rest(run, start):
    assert run.batches(start, STEPS - start) == run.batches()[start:]


@given(run=RUNS)
def test_processes_share_the_batches_of_one(run):
    """No position, which an image's augmentation is drawn from, comes twice."""
    whole, parts = run.batches(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detectron2.utils.comm.get_world_size", lambda: run.processes)
        for rank in range(run.processes):
            patch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            parts.append(run.batches())
    assert [position for batch in whole for position, _ in batch] == list(range(STEPS * run.share * run.processes))
    for step, batch in enumerate(whole):
        assert [part[step] for part in parts] == [batch[rank :: run.processes] for rank in range(run.processes)]
