"""Order and content of batches: a function of (seed, epoch, index)."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from d2distill.classification.data import AugmentedDataset, build_dataset
from d2distill.classification.data.loader import EpochBatchSampler, FixedSubset, build_test_loader, build_train_loader
from d2distill.classification.evaluation import AccuracyEvaluator
from d2distill.common.engine.loading import WorkerLoader, _worker_killed
from d2distill.common.errors import DataError, DivergedError
from tests import processes

ROOT = Path(__file__).resolve().parents[2]


def test_the_order_of_published_runs():
    """Numbers that runs in the past have had: with others none of them could be resumed or repeated."""
    epochs = [[6, 7, 3, 9], [5, 1, 0, 2], [4, 8]], [[1, 6, 9, 4], [8, 7, 3, 2], [0, 5]]
    keys = [[(epoch, index) for index in batch] for epoch, batches in enumerate(epochs, 1) for batch in batches]
    assert list(EpochBatchSampler(num_samples=10, batch_size=4, epochs=2, seed=5)) == keys


def test_every_epoch_is_a_permutation():
    batches = list(EpochBatchSampler(num_samples=10, batch_size=4, epochs=3, seed=5))
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    orders = []
    for epoch in (1, 2, 3):
        keys = [key for batch in batches[3 * epoch - 3 : 3 * epoch] for key in batch]
        assert {e for e, _ in keys} == {epoch} and sorted(i for _, i in keys) == list(range(10))
        orders.append(tuple(i for _, i in keys))
    assert len(set(orders)) == 3


def test_the_order_depends_on_the_seed_alone():
    assert list(EpochBatchSampler(10, 4, 2, 5)) != list(EpochBatchSampler(10, 4, 2, 6))
    # More epochs only add to the end.
    assert list(EpochBatchSampler(10, 4, 5, 5))[:6] == list(EpochBatchSampler(10, 4, 2, 5))


@pytest.mark.parametrize(
    ("num_samples", "expected"), [(6, [(1, 1), (1, 1)]), (7, [(1, 1), (4 / 3, 2 / 3)]), (5, [(1, 1), (2, 0)])]
)
def test_weighted_means_of_the_ranks_average_to_the_mean_over_the_batch(monkeypatch, num_samples, expected):
    sampler = EpochBatchSampler(num_samples, 4, 2, 5)
    monkeypatch.setattr("d2distill.classification.data.loader.comm.get_world_size", lambda: 2)
    weights = []
    for rank in (0, 1):
        monkeypatch.setattr("d2distill.classification.data.loader.comm.get_rank", lambda rank=rank: rank)
        weights.append([sampler.rank_loss_weight(step) for step in range(4)])
    np.testing.assert_allclose(list(zip(*weights, strict=True)), 2 * expected)


def test_order_and_augmentation_are_drawn_apart():
    order = [index for _, index in next(iter(EpochBatchSampler(40, 40, 1, seed=5)))]
    assert not np.array_equal(order, np.random.default_rng([5, 1, 0]).permutation(40))


@pytest.fixture(scope="module")
def digits():
    return build_dataset("digits", split="train")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_whatever_the_workers_and_the_start(digits, workers):
    def load(start, workers):
        sampler = EpochBatchSampler(len(digits), 500, 2, seed=1, start=start)
        state = np.random.get_state()[1].copy(), torch.get_rng_state()
        batches = list(build_train_loader(digits, sampler, 32, "crop", workers))
        assert np.array_equal(np.random.get_state()[1], state[0]) and torch.equal(torch.get_rng_state(), state[1])
        return batches

    whole, tail = load(0, 0), load(4, workers)
    assert len(whole) == 6 and len(tail) == 2
    for a, b in zip(whole[4:], tail, strict=True):
        assert b["image"].dtype == torch.uint8 and b["image"].shape[1:] == (3, 32, 32)
        assert all(torch.equal(a[key], b[key]) for key in ("image", "label", "index"))
        sample = AugmentedDataset(digits, 32, 1, "crop")[2, int(b["index"][0])]
        assert torch.equal(b["image"][0], sample["image"]) and b["label"][0] == sample["label"]


def test_not_more_workers_than_cores(digits, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})
    assert build_test_loader(digits, 400, 32, 9).num_workers == 1


def test_the_test_loader_gives_every_image_once_as_it_is(digits):
    batches = list(build_test_loader(digits, 400, 32, 0))
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(len(digits)))
    assert torch.equal(batches[0]["image"][7], digits.load(7)[0])


def test_subset_is_fixed_and_nested(digits):
    small, large = FixedSubset(digits, 50), FixedSubset(digits, 100)
    assert small.positions[:5].tolist() == [446, 365, 289, 891, 1250], "of past runs with DATASETS.TRAIN_SIZE"
    assert len(small) == 50 and small.num_classes == 10 and set(small.labels.tolist()) == set(range(10))
    assert torch.equal(small.labels, large.labels[:50])
    assert torch.equal(small.load(3)[0], large.load(3)[0]) and small.load(3)[1] == small.labels[3]


@pytest.mark.parametrize("batches_before", [0, 2])
def test_workers_outlive_sigterm_and_end_with_the_iterator(digits, batches_before):
    """Also one that comes while they start."""
    iterator = iter(build_train_loader(digits, EpochBatchSampler(len(digits), 100, 50, 0), 32, "crop", 2))
    workers = multiprocessing.active_children()
    for _ in range(batches_before):
        next(iterator)
    # Of another process: a scheduler's, or the terminal's.
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    for _ in range(4):
        next(iterator)
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    assert not {signal.SIGTERM, signal.SIGINT} & signal.pthread_sigmask(signal.SIG_BLOCK, ())
    del iterator
    assert all(worker.exitcode == 0 for worker in workers)


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        time.sleep(0.5)
        return torch.tensor(index)


@pytest.mark.slow
def test_workers_of_a_server():
    """Python 3.14 starts them so: they have another parent than the process that they work for."""
    loader = WorkerLoader(Slow(), batch_size=1, num_workers=1, multiprocessing_context="forkserver")
    assert [batch.item() for batch in loader] == [0, 1, 2]


class Broken(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            raise self.error from OSError("the decoder's")
        return index


@pytest.mark.parametrize("error", [DataError("cannot read image 5.jpg"), DivergedError("in a worker.")])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_for_the_user_comes_out_of_a_worker_as_it_went_in(error, workers):
    batches = iter(WorkerLoader(Broken(error), num_workers=workers, batch_size=2))
    assert next(batches).tolist() == [0, 1] and next(batches).tolist() == [2, 3]
    with pytest.raises(type(error)) as caught:
        next(batches)
    assert str(caught.value) == str(error) and not multiprocessing.active_children()


class Victim(torch.utils.data.Dataset):
    """Its worker is killed in batch 1, as by a system without memory."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_worker_that_the_system_kills_is_one_line(elsewhere):
    batches = iter(WorkerLoader(Victim(), num_workers=1, batch_size=2))
    with pytest.raises(DataError, match=r"^a worker of the data loader has ended .*DATALOADER.NUM_WORKERS"):
        if elsewhere:  # the main process is in a step then
            time.sleep(9)
        list(batches)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("of the data set"), ConnectionError("Caught ConnectionError in DataLoader worker process 0.")],
)
def test_an_error_of_a_data_set_is_not_taken_for_a_killed_worker(error):
    with pytest.raises(type(error)) as caught:
        list(WorkerLoader(Broken(error), num_workers=0, batch_size=2))
    assert caught.value is error and _worker_killed(error) is None


def killed_with_workers(pids):
    batches = iter(WorkerLoader(range(99), num_workers=2, batch_size=1))
    next(batches)
    pids.write_text(" ".join(str(worker.pid) for worker in multiprocessing.active_children()))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(tmp_path):
    assert processes.exit_code(processes.start(killed_with_workers, tmp_path / "pids")) == -signal.SIGKILL
    workers = [Path("/proc", pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 4  # torch's own workers look after 5 seconds
    while any(worker.exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) == 2 and not any(worker.exists() for worker in workers)


def test_workers_that_are_left_at_exit_end_without_a_word():
    code = """
from d2distill.common.engine.loading import WorkerLoader, _worker_killed
batches = iter(WorkerLoader(range(99), num_workers=2, batch_size=1))
next(batches)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, "")


def test_accuracy():
    evaluator = AccuracyEvaluator()
    evaluator.reset()
    logits = torch.eye(10)[[0, 1, 2, 3]] * 2 + torch.linspace(0, 1, 10)
    # In row 0 the order of classes is 0, 9, 8, ... 1: class 0 is first, 6 fifth, 5 sixth.
    evaluator.process({"label": torch.tensor([0, 1])}, logits[:2])
    evaluator.process({"label": torch.tensor([6, 4])}, logits[[0, 0]])
    loss = F.cross_entropy(logits[[0, 1, 0, 0]], torch.tensor([0, 1, 6, 4])).item()
    assert evaluator.evaluate() == {"top1": 50.0, "top5": 75.0, "test_loss": pytest.approx(loss)}


def test_accuracy_with_few_classes():
    evaluator = AccuracyEvaluator()
    evaluator.reset()
    evaluator.process({"label": torch.tensor([0, 1, 1])}, torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]]))
    loss = math.log(1 + math.e) - 2 / 3  # of logits that differ by 1, two of the three images right
    results = evaluator.evaluate()
    assert results == {"top1": pytest.approx(200 / 3), "top5": 100.0, "test_loss": pytest.approx(loss)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_accuracy_of_logits_that_are_not_finite(value):
    evaluator = AccuracyEvaluator()
    evaluator.reset()
    evaluator.process({"label": torch.tensor([0, 1])}, torch.tensor([[1.0, 0], [1.0, value]]))
    evaluator.process({"label": torch.tensor([0])}, torch.tensor([[1.0, 0]]))
    with pytest.raises(DivergedError, match="logits of 1 of 3 test images are not finite"):
        evaluator.evaluate()
