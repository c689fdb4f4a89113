"""All processes of a job resume from the checkpoint that the main one chooses, or none does."""

import os
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from d2distill.common.engine.checkpoint import RunCheckpointer
from d2distill.common.errors import CheckpointError

pytestmark = pytest.mark.slow


DAMAGED = b"half a file"


def checkpoint(folder, step):
    checkpointer = RunCheckpointer(torch.nn.Linear(1, 1), str(folder), keep=9)
    checkpointer.save(f"model_{step:07d}", settings={}, run_identity={})


def latest(folder):
    try:
        found = RunCheckpointer(torch.nn.Linear(1, 1), str(folder)).latest()
        return found and found[0].name
    except CheckpointError as error:
        return str(error)


def work(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # Folders that are local to a node: each process has its own.
    found = [latest(Path(folder, case, f"node{rank}")) for case in ("same", "damaged here", "damaged there", "behind")]
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may abort an orderly end


def test_the_main_process_decides_for_all(tmp_path):
    for case in ("same", "damaged here", "damaged there", "behind"):
        for node in ("node0", "node1"):
            folder = tmp_path / case / node
            folder.mkdir(parents=True)
            checkpoint(folder, 2)
            if (case, node) != ("behind", "node1"):
                checkpoint(folder, 4)
    (tmp_path / "damaged here" / "node0" / "model_0000004.pth").write_bytes(DAMAGED)
    (tmp_path / "damaged there" / "node1" / "model_0000004.pth").write_bytes(DAMAGED)
    multiprocessing.start_processes(work, (str(tmp_path),), nprocs=2, start_method="spawn")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert found[0] == found[1]
    same, here, there, behind = found[0]
    assert (same, here) == ("model_0000004.pth", "model_0000002.pth")
    for error in (there, behind):
        assert "the job resumes from model_0000004.pth, but rank 1 cannot follow: " in error
        assert "OUTPUT_DIR must be one folder for all nodes" in error
