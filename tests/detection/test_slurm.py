"""SLURM's scripts start the trainer of detectors too."""

import json

import pytest

from d2distill.common.engine.writers import read_metrics
from tests.detection.tiny_training import STEPS, tiny_cfg
from tests.fake_slurm import slurm


@pytest.mark.slow
@pytest.mark.parametrize("script", ["slurm_train.sh", "train.sbatch"])
def test_two_tasks_train_a_detector(tiny, tmp_path, script):
    (tmp_path / "c.yaml").write_text(tiny_cfg("rcnn", tmp_path / "run").dump())
    arguments = [tmp_path / "c.yaml", tmp_path / "run", "LOG_PERIOD", 1]
    if script == "slurm_train.sh":
        arguments = ["debug", "name", *arguments]
    done = slurm(tmp_path, script, *arguments, TRAIN_PROGRAM="detection/train_net.py")
    assert done.returncode == 0, done.stdout + done.stderr
    command = (tmp_path / "srun.txt").read_text().splitlines()
    assert command[command.index("python") :][:4] == ["python", "-u", "detection/train_net.py", "--config-file"]
    assert (tmp_path / "run" / "log.txt.rank1").is_file() and len(read_metrics(tmp_path / "run")) == STEPS
    assert "bbox/AP" in json.loads((tmp_path / "run" / "results.json").read_text())
