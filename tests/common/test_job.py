"""A process's rank in a job, from the variables of torchrun and SLURM."""

import pytest

from d2distill.common.engine.job import Job
from d2distill.common.errors import ConfigError

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "6", "SLURM_NTASKS": "7", "SLURM_LOCALID": "0", "SLURM_NODEID": "3", "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[003-005,12]", "SLURM_JOB_ID": "1234567",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}  # fmt: skip


def test_torchrun_takes_precedence_over_slurm():
    assert Job.from_environ({**SRUN, **TORCHRUN}) == Job(5, 8, 1, 4, "a", 29500)


def test_slurm():
    job = Job.from_environ(SRUN)
    assert (job.rank, job.world_size, job.local_rank, job.node) == (6, 7, 0, 3)
    # srun may have been typed on a login node: task 0 is on the first of the list.
    assert job.master_addr == "gpu003" and 20000 <= job.master_port < 30000
    assert job.master_port != Job.from_environ({**SRUN, "SLURM_STEP_ID": "3"}).master_port
    # Jobs that are submitted one after another share nodes.
    assert job.master_port != Job.from_environ({**SRUN, "SLURM_JOB_ID": "1234568", "SLURM_STEP_ID": "1"}).master_port
    first = Job.from_environ({**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"})
    assert (first.master_addr, first.master_port) == (job.master_addr, job.master_port)


@pytest.mark.parametrize(
    ("nodes", "address"),
    [
        ("one", "one"),
        ("a1,b2", "a1"),
        ("gpu[7,9]", "gpu7"),
        ("n[01-10]-ib,x", "n01-ib"),
        ("c-1.cluster", "c-1.cluster"),
        ("", "10.0.0.1"),
    ],
)
def test_the_first_node(nodes, address):
    assert Job.from_environ({**SRUN, "SLURM_STEP_NODELIST": nodes}).master_addr == address


def test_the_users_own_master_is_kept():
    job = Job.from_environ({**SRUN, "MASTER_ADDR": "mine", "MASTER_PORT": "1"})
    assert (job.master_addr, job.master_port) == ("mine", 1)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"},  # a batch script
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},  # an interactive shell in an allocation of several tasks
    ],
)
def test_a_process_by_itself(environ):
    assert Job.from_environ(environ) is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({**TORCHRUN, "RANK": "x"}, "RANK in the environment is 'x', not a number"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT in the environment is '', not a number"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT 99999 in the environment is no port"),
        ({**TORCHRUN, "WORLD_SIZE": "2"}, "rank 5 of 2, number 1 on its node, which cannot be"),
        ({**SRUN, "SLURM_NTASKS": "4(x2)"}, r"SLURM_NTASKS in the environment is '4\(x2\)', not a number"),
        ({**SRUN, "SLURM_PROCID": "7"}, "srun says that this is rank 7 of 7"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID in the environment is ''"),
        ({**SRUN, "SLURM_JOB_ID": "1_2"}, "SLURM_JOB_ID in the environment is '1_2'"),
        ({**SRUN, "SLURM_STEP_NODELIST": "", "SLURM_LAUNCH_NODE_IPADDR": ""}, "names no node: set MASTER_ADDR"),
    ],
)
def test_variables_that_make_no_job_are_named(environ, message):
    with pytest.raises(ConfigError, match=message):
        Job.from_environ(environ)


def test_gpus():
    job = Job.from_environ({**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"})
    assert job.device_index(2, 2, {}) == 1 and job.device_index(8, 2, {}) == 1
    assert Job.from_environ(TORCHRUN).device_index(8, 4, {}) == 1  # of the node's, whatever the rank over all nodes
    assert job.device_index(1, 2, {"SLURM_GPUS_ON_NODE": "2"}) == 0  # each task sees its own
    with pytest.raises(ConfigError, match="2 processes on this node, but it has 1 GPU:"):
        job.device_index(1, 2, {"SLURM_GPUS_ON_NODE": "1"})
    with pytest.raises(ConfigError, match="torchrun starts 4 processes on this node, but it has 1 GPU:"):
        Job.from_environ(TORCHRUN).device_index(1, 4, {})
