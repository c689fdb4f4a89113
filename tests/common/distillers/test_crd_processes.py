"""CRD on two processes: the banks, classes and Z of one process with the whole batch."""

import os

import pytest
import torch
from torch import distributed, multiprocessing

from d2distill.common.distillers import Context
from d2distill.common.outputs import Outputs
from tests.common.distillers.test_crd import LABELS, SAMPLES, make, outputs

# Per step the samples of rank 0 and of rank 1: of equal and of other numbers, none on one, none at all, one on both.
STEPS = [([0, 1, 2], [3, 4, 5]), ([6, 7], [8]), ([], [9, 10]), ([], []), ([11], [12, 11]), ([0, 1], [])]
KEPT = ("bank_student", "bank_teacher", "z", "labels")


def run(rank):
    """States after each step, and each step's loss times its samples; `rank` None is all samples in one process."""
    torch.set_num_threads(1)
    method, history = make(), []
    for t, shares in enumerate(STEPS):
        index = torch.tensor([*shares[0], *shares[1]], dtype=torch.long)
        contrast = torch.randint(SAMPLES, (len(index), 6), generator=torch.Generator().manual_seed(t))
        student, teacher = (o.pooled for o in outputs(len(index), seed=t))
        first, last = (0, len(index)) if rank is None else [(0, len(shares[0])), (len(shares[0]), len(index))][rank]
        ctx = Context(1.0, index[first:last], contrast[first:last])
        loss = method(
            Outputs(pooled=student[first:last]), Outputs(pooled=teacher[first:last]), LABELS[index[first:last]], ctx
        )["loss_crd"]
        loss.backward()
        history.append((loss.item() * (last - first), [method.state_dict()[name].clone() for name in KEPT]))
    return history


def work(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(run(rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.start_processes(work, (str(folder),), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_processes_agree_bit_for_bit(histories):
    for (_, first), (_, second) in zip(*histories, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_processes_are_one_process_with_the_whole_batch(histories):
    for t, (total, state) in enumerate(run(None)):
        assert sum(history[t][0] for history in histories) == pytest.approx(total, rel=1e-5)
        for whole, shared in zip(state, histories[0][t][1], strict=True):
            assert torch.allclose(whole, shared, rtol=1e-5, atol=1e-6)
    assert state[3][:13].tolist() == LABELS[:13].tolist() and (state[3][13:] == -1).all()
