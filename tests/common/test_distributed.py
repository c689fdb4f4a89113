"""What a training's settings must fit where it runs in several processes."""

import pytest
import torch
from detectron2.utils import comm

from d2distill.common.config import CfgNode
from d2distill.common.engine.distributed import check_processes, run_on_main_process
from d2distill.common.errors import ConfigError, OutputError


def check(monkeypatch, device, processes, here, batch=8, gpus=4):
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    monkeypatch.setattr(comm, "get_local_size", lambda: here)
    monkeypatch.setattr(comm, "all_gather", lambda own: [own] * processes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    check_processes(CfgNode({"MODEL": {"DEVICE": device}, "SOLVER": {"IMS_PER_BATCH": batch}}))


@pytest.mark.parametrize("device", ["cuda:0", "cuda:3"])
def test_one_gpu_for_several_processes_is_refused(monkeypatch, device):
    with pytest.raises(ConfigError, match=f"MODEL.DEVICE is {device}, which the 2 processes on this machine would"):
        check(monkeypatch, device, 4, 2)


@pytest.mark.parametrize(
    ("device", "processes", "here", "gpus"),
    [
        ("cuda:3", 1, 1, 4),
        ("cuda:0", 2, 1, 1),
        ("cuda", 2, 2, 4),
        ("auto", 2, 2, 0),
    ],
)
def test_a_gpu_for_each_process(monkeypatch, device, processes, here, gpus):
    check(monkeypatch, device, processes, here, gpus=gpus)


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 0), ("cuda:0", 0), ("cuda:4", 4)])
def test_a_gpu_that_is_not_there(monkeypatch, device, gpus):
    with pytest.raises(ConfigError, match=f"MODEL.DEVICE is {device}, but this machine has {gpus} GPUs"):
        check(monkeypatch, device, 1, 1, gpus=gpus)


def test_batches_are_shared_out_evenly(monkeypatch):
    with pytest.raises(ConfigError, match="IMS_PER_BATCH 8 cannot be shared out evenly over 3 processes"):
        check(monkeypatch, "cpu", 3, 3)


def test_what_the_main_process_cannot_do_ends_the_others_as_well(monkeypatch):
    error, done = OutputError("disk full"), []
    assert run_on_main_process(lambda: 5) == 5

    def fail():
        done.append(comm.get_rank())
        raise error

    with pytest.raises(OutputError, match="disk full"):
        run_on_main_process(fail)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    monkeypatch.setattr(comm, "all_gather", lambda own: [(None, error), own])
    with pytest.raises(OutputError, match="disk full"):
        run_on_main_process(fail)
    assert done == [0]
