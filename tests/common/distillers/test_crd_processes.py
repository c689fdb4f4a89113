"""CRD on two processes: the banks and Z of one process with the whole batch."""

import os

import pytest
import torch
from torch import distributed, multiprocessing

from d2distill.common.outputs import Batch, Outputs
from tests.common.distillers.test_crd import SAMPLES, make, outputs

pytestmark = pytest.mark.slow


# Per step the samples of rank 0 and of rank 1: of equal and of other numbers, none on one, none at all, one on both.
STEPS = [([0, 1, 2], [3, 4, 5]), ([6, 7], [8]), ([], [9, 10]), ([], []), ([11], [12, 11]), ([0, 1], [])]


def run(rank):
    """States after each step, and each step's loss times its samples; `rank` None is all samples in one process."""
    torch.set_num_threads(1)
    method, history = make(), []
    for t, shares in enumerate(STEPS):
        index = torch.tensor([*shares[0], *shares[1]], dtype=torch.long)
        contrast = torch.randint(SAMPLES, (len(index), 6), generator=torch.Generator().manual_seed(t))
        first, last = (0, len(index)) if rank is None else [(0, len(shares[0])), (len(shares[0]), len(index))][rank]
        student, teacher = (Outputs(pooled=o.pooled[first:last]) for o in outputs(len(index), seed=t))
        batch = Batch(index=index[first:last], extras={"contrast_index": contrast[first:last]})
        loss = method(student, teacher, batch)
        loss.backward()
        state = [method.state_dict()[name].clone() for name in ("bank_student", "bank_teacher", "z")]
        history.append((loss.item() * (last - first), state))
    return history


def work(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(run(rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_processes_are_one_process_with_the_whole_batch(tmp_path):
    multiprocessing.start_processes(work, (str(tmp_path),), nprocs=2, start_method="spawn")
    histories = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for (total, whole), (one, first), (other, second) in zip(run(None), *histories, strict=True):
        assert one + other == pytest.approx(total, rel=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "the processes differ"
        torch.testing.assert_close(first, whole, rtol=1e-5, atol=1e-6)
