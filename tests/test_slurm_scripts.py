"""What tools/slurm_train.sh and tools/train.sbatch ask of SLURM."""

import pytest

from tests.fake_slurm import slurm

COMMAND = [
    "python", "-u", "detection/train_net.py", "--config-file", "c.yaml", "--resume", "OUTPUT_DIR", "run", "SEED", "3",
]  # fmt: skip


def test_slurm_train(tmp_path):
    done, calls = slurm(
        tmp_path, "slurm_train.sh", "debug", "name", "c.yaml", "run", "SEED", "3",
        TRAIN_PROGRAM="detection/train_net.py", GPUS="2", SRUN_ARGS="--time=1:00:00 --exclusive",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert calls["srun"] == [
        "--partition=debug", "--job-name=name", "--gres=gpu:2", "--ntasks=2", "--ntasks-per-node=2",
        "--cpus-per-task=5", "--kill-on-bad-exit=1", "--signal=TERM@120", "--time=1:00:00", "--exclusive",
        *COMMAND,
    ]  # fmt: skip


@pytest.mark.parametrize(("code", "again"), [(0, False), (143, True), (2, False)])
def test_a_preempted_job_requeues_itself(tmp_path, code, again):
    done, calls = slurm(
        tmp_path, "train.sbatch", "c.yaml", "run", "SEED", "3", srun=f"exit {code}", SLURM_JOB_ID="7",
        TRAIN_PROGRAM="detection/train_net.py",
    )  # fmt: skip
    assert done.returncode == code and ("scontrol" in calls) == again
    assert calls["srun"] == ["--cpus-per-task=5", "--kill-on-bad-exit=1", *COMMAND]
    assert not again or calls["scontrol"] == ["requeue", "7"]


@pytest.mark.parametrize("script", ["slurm_train.sh", "train.sbatch"])
def test_usage(tmp_path, script):
    done, calls = slurm(tmp_path, script, "one")
    assert done.returncode == 2 and "usage:" in done.stderr and not calls
