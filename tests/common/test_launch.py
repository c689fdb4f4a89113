"""The processes of a job: how they find each other, and the one line where one of them differs or dies."""

import os
import signal
import socket
import subprocess

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm

from d2distill.common.config import CfgNode
from d2distill.common.engine import peers
from d2distill.common.engine.distributed import check_processes
from d2distill.common.engine.launch import _address, _store, launch
from d2distill.common.engine.peers import Peers, RankEndedError, check_same_on_all_ranks, naming_ended_rank
from d2distill.common.errors import ConfigError
from tests.processes import exit_code, in_job, run_ranks, start


def die_or_wait():
    """The last rank is killed, while the others wait for it."""
    if comm.get_rank() == comm.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()


@pytest.mark.slow
def test_peers_of_a_killed_rank_name_it_and_the_next_attempt_finds_itself(tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert run_ranks(3, in_job, die_or_wait, store=store, output=tmp_path) == [2, 2, -signal.SIGKILL]
    said = "".join((tmp_path / f"rank{rank}").read_text() for rank in range(3))
    assert said.count("\n") == 1 and said.startswith("error: rank 2 has ended")
    # torchrun keeps its store for it.
    assert run_ranks(2, in_job, comm.synchronize, store=store) == [0, 0]


def kill_first():
    if comm.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()


@pytest.mark.slow
def test_the_end_of_rank_0_is_said_once_where_it_had_the_store(tmp_path):
    """As by srun. torch's own warnings of the connection follow."""
    assert run_ranks(3, in_job, kill_first, hosted=False, output=tmp_path) == [-signal.SIGKILL, 2, 2]
    said = "".join((tmp_path / f"rank{rank}").read_text() for rank in range(3))
    assert said.count("error: ") == 1 and "error: rank 0 has ended" in said and "Traceback" not in said


def launch_and_die():
    # As on a machine with two GPUs, which the processes that it starts do not find: they use gloo.
    torch.cuda.device_count = lambda: 2
    launch(die_or_wait, (), 2)


@pytest.mark.slow
def test_a_killed_process_of_num_gpus_is_named_in_one_line(tmp_path):
    code = exit_code(start(launch_and_die, output=tmp_path / "out"))
    said = (tmp_path / "out").read_text()
    assert code == 128 + signal.SIGKILL and said.count("\n") == 1
    assert said.startswith(("error: rank 1 has ended", "error: rank 1 was ended by SIGKILL")), said


def check_with_own_seed():
    settings = {"SEED": int(os.environ["RANK"]), "SOLVER": {"IMS_PER_BATCH": 4}, "MODEL": {"DEVICE": "cpu"}}
    check_processes(CfgNode(settings))


@pytest.mark.slow
def test_ranks_of_different_seeds_refuse_to_start(tmp_path):
    assert run_ranks(2, in_job, check_with_own_seed, output=tmp_path) == [2, 2]
    said = "".join((tmp_path / f"rank{rank}").read_text() for rank in range(2))
    assert said.count("\n") == 1 and said.startswith("error: SEED is 0 on rank 0, but 1 on rank 1: all processes")


@pytest.mark.parametrize(
    ("key", "first", "other"),
    [("SOLVER.BASE_LR", 0.1, 0.2), ("--resume", True, False), ("the teacher's weights", "a", None)],
)
def test_the_first_difference_between_ranks_is_named(monkeypatch, key, first, other):
    gathered = [{"SEED": 0, key: first}, {"SEED": 0, key: first}, {"SEED": 0, key: other}]
    monkeypatch.setattr(comm, "all_gather", lambda own: gathered)
    with pytest.raises(ConfigError, match=rf"^{key} is {first!r} on rank 0, but {other!r} on rank 2"):
        check_same_on_all_ranks({})


def test_where_a_node_has_its_files_may_differ(monkeypatch):
    monkeypatch.setattr(comm, "all_gather", lambda own: [own, {"NAN": float("nan")}])
    check_same_on_all_ranks({"DATASETS.ROOT": "/local/1", "MODEL.TEACHER.WEIGHTS": "/local/1/a", "NAN": float("nan")})


def test_an_error_by_the_end_of_another_rank_names_it(monkeypatch):
    def raised(error):
        with pytest.raises(Exception) as caught, naming_ended_rank():
            raise error
        return caught.value

    fault = RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer")
    assert raised(fault) is fault
    ended = subprocess.Popen(["true"])  # not waited for, as by a launcher that has not looked yet
    monkeypatch.setattr(peers, "_peers", Peers(dist.HashStore(), {1: os.getpid(), 2: ended.pid}))
    assert isinstance(raised(fault), RankEndedError) and str(raised(fault)).startswith("rank 2 has ended, and the rest")
    own = ConfigError("SEED is -1")
    assert raised(own) is own
    ended.wait()
    # All ranks of another node have ended: nobody is there to say which came first.
    peers._peers.close()
    peers._peers = Peers(dist.HashStore(), {1: None, 2: None})
    peers._peers.ended = []
    assert str(raised(fault)).startswith("one of the ranks 1, 2 has ended")
    own = RuntimeError("a fault of ours")
    assert raised(own) is own


def test_a_port_that_is_taken_is_named(capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"rank 0 cannot listen at 127.0.0.1:{port} .*MASTER_PORT"):
            _store("127.0.0.1", port, is_master=True)
    assert capfd.readouterr() == ("", "")


def test_the_address_of_several_machines():
    assert _address("auto", 1) == ("127.0.0.1", 0) and _address("tcp://a:29500", 2) == ("a", 29500)
    with pytest.raises(ConfigError, match="--dist-url file:///a: several machines need tcp://HOST:PORT"):
        _address("file:///a", 2)
