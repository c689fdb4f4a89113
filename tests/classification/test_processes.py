"""Several processes train, evaluate, stop and resume as one does (gloo on CPUs)."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.layers import NaiveSyncBatchNorm
from timm.layers import BatchNormAct2d

from d2distill.classification.trainer import build_trainer, load_datasets
from d2distill.common.engine.distributed import synchronize_batch_norms
from d2distill.common.engine.launch import launch, processes_to_start
from d2distill.common.engine.seeding import seed_step
from d2distill.common.engine.writers import read_metrics
from d2distill.common.errors import ConfigError, DivergedError
from tests.classification.multi_process_training import main
from tests.classification.tiny_training import run, small_cfg, state
from tests.dataset_files import write_image_folder
from tests.fake_slurm import RUN_TWO_TASKS, slurm
from tests.interruptions import assert_identical
from tests.processes import exit_code, in_job, run_ranks, script, start
from tests.tiny_task import tiny_trainer

ROOT = Path(__file__).resolve().parents[2]
EQUAL = ("plain", "nine", "one", "dot")


def train_cases(processes, folder, *names):
    """Exit codes of processes that train these cases, as torchrun's."""
    return run_ranks(processes, in_job, main, str(folder), names)


def resume(folder):
    assert run_ranks(2, script, "tools/train_cls.py", "--config-file", folder / "config.yaml", "--resume") == [0, 0]


def load(folder, rank=0):
    return torch.load(folder / f"rank{rank}.pth", weights_only=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    assert exit_code(start(main, str(folder), (*EQUAL, "two"))) == 0
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    assert train_cases(2, folder, *EQUAL, "connectors", "banks", "unbroken") == [0, 0]
    return folder


def assert_equal_runs(one, several):
    """The same losses in each step and the same student, but for rounding."""
    expected, found = read_metrics(one), read_metrics(several)
    assert len(expected) == len(found) == 6
    for a, b in zip(expected, found, strict=True):
        # The running statistics of the evaluation are Detectron2's norms', which keep the biased variance.
        assert a.get("test_loss", 0) == pytest.approx(b.get("test_loss", 0), rel=1e-2)
        losses, same = ({n for n in c if "loss" in n or n == "train_top1"} - {"test_loss"} for c in (a, b))
        assert losses == same and len(losses) > 1
        assert {name: a[name] for name in losses} == pytest.approx({name: b[name] for name in losses}, rel=1e-5)
        assert a.get("top1") == b.get("top1")
    a, b = load(one)["final"], load(several)["final"]
    for name in a:
        if "running_" not in name and "num_batches" not in name:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("case", EQUAL)
def test_two_processes_train_as_one(one, two, case):
    assert_equal_runs(one / case, two / case)


@pytest.mark.slow
def test_a_process_without_samples_does_not_count(one, tmp_path):
    assert train_cases(3, tmp_path, "two") == [0, 0, 0]
    assert_equal_runs(one / "two", tmp_path / "two")


@pytest.mark.slow
def test_accuracy_is_over_each_image_once(one, two):
    parts = [load(two / "plain", rank) for rank in (0, 1)]
    assert torch.cat([part["tested"] for part in parts]).tolist() == list(range(99))
    assert parts[0]["accuracy"] == load(one / "plain")["accuracy"] and not parts[1]["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*EQUAL, "connectors", "banks"])
def test_all_processes_have_the_same_weights_and_memories(two, case):
    a, b = (load(two / case, rank) for rank in (0, 1))
    for part in ("initial", "teacher", "final"):
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            own = part == "final" and "running_" in name  # each process's batches; the main one's are saved
            assert own or torch.equal(a[part][name], b[part][name]), (part, name)
    assert not torch.equal(a["drawn"], b["drawn"])
    if case == "banks":
        assert not torch.equal(a["initial"]["distillers.crd.bank_student"], a["final"]["distillers.crd.bank_student"])


def test_steps_differ_between_processes_and_starts_do_not(monkeypatch):
    def draw(*arguments, **settings):
        seed_step(*arguments, **settings)
        return torch.rand(3).tolist()

    alone = draw(3, 0)
    monkeypatch.setattr("d2distill.common.engine.seeding.comm.get_rank", lambda: 1)
    assert draw(3, 0) != alone and draw(3, 0, rank=0) == alone


def test_every_process_evaluates_with_the_main_ones_statistics(tmp_path, monkeypatch):
    cfg, sent = small_cfg(tmp_path), []
    trainer = build_trainer(cfg, *load_datasets(cfg))
    monkeypatch.setattr("d2distill.classification.testing.broadcast_buffers", sent.append)
    monkeypatch.setattr("d2distill.classification.testing.inference_on_dataset", lambda *_: {"sent": list(sent)})
    monkeypatch.setattr("d2distill.classification.testing.run_on_main_process", lambda action: {})
    assert trainer.evaluate() == {"sent": []}
    monkeypatch.setattr("d2distill.classification.testing.comm.get_world_size", lambda: 2)
    assert trainer.evaluate() == {"sent": [trainer.task.model.student]}


def _other_has_nan(own):
    return [own, {"loss": float("nan")} if isinstance(own, dict) else "loss_kd"]


def test_a_loss_that_is_not_finite_in_one_process_stops_all(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    trainer.metrics.update({"loss": torch.tensor(1.0)})
    assert trainer.gather_finite_means() == [{"loss": 1.0}]
    monkeypatch.setattr("d2distill.common.engine.trainer.comm.all_gather", _other_has_nan)
    with pytest.raises(DivergedError, match="loss_kd became infinite or NaN"):
        trainer.gather_finite_means()


def test_synchronized_batch_norms():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4))
    names = list(network.state_dict())
    assert synchronize_batch_norms(network) and list(network.state_dict()) == names
    assert all(type(norm) is NaiveSyncBatchNorm and norm._stats_mode == "N" for norm in network[1:])
    assert not synchronize_batch_norms(torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="BatchNormAct2d cannot be synchronized"):
        synchronize_batch_norms(torch.nn.Sequential(BatchNormAct2d(4)))


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_and_resuming_is_exact(two, tmp_path):
    assert train_cases(2, tmp_path, "stopped") == [143, 143]
    folder = tmp_path / "stopped"
    # One step, the same for both, or they would wait for each other.
    assert max(path.name for path in folder.glob("model_*")) == "model_0000005.pth"
    assert "SIGTERM: saved after step 5" in (folder / "log.txt").read_text()
    assert "SIGTERM: saved after step 5" in (folder / "log.txt.rank1").read_text()
    pending = torch.load(folder / "model_0000005.pth", weights_only=True)["trainer"]["metrics"]
    counts = [losses["counts"] for losses, _ in pending]
    assert len(counts) == 2 and counts[0] == counts[1] and counts[0]["loss_ce"] > 0
    resume(folder)
    assert_identical(state(folder), state(two / "unbroken"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_and_resuming_is_exact(two, tmp_path, rank):
    codes = train_cases(2, tmp_path, f"rank {rank} killed")
    assert codes.pop(rank) == -signal.SIGKILL and codes != [0]
    folder = tmp_path / f"rank {rank} killed"
    assert max(path.name for path in folder.glob("model_*.pth")) == "model_0000003.pth"
    resume(folder)
    assert_identical(state(folder), state(two / "unbroken"))


@pytest.mark.slow
def test_sigterm_to_one_process_in_an_evaluation(two, tmp_path):
    """None continues with it, and none waits for the others."""
    assert train_cases(2, tmp_path, "stopped in evaluation") == [143, 143]
    folder = tmp_path / "stopped in evaluation"
    assert max(path.name for path in folder.glob("model_*")) == "model_0000006.pth"
    assert read_metrics(folder)[-1]["iteration"] == 3
    resume(folder)
    assert_identical(state(folder), state(two / "unbroken"))


@pytest.mark.slow
def test_an_error_of_one_process_in_an_evaluation(two, tmp_path):
    """All say it and end, and what was trained is saved."""
    assert train_cases(2, tmp_path, "broken evaluation") == [2, 2]
    folder = tmp_path / "broken evaluation"
    assert max(path.name for path in folder.glob("model_*")) == "model_0000006.pth"
    for name in ("log.txt", "log.txt.rank1"):
        log = (folder / name).read_text()
        assert log.count("ERROR: cannot read image 7.jpg") == 1 and "Traceback" not in log
    resume(folder)
    assert_identical(state(folder), state(two / "unbroken"))


@pytest.mark.slow
def test_another_number_of_processes_resumes(two, tmp_path):
    checkpoint = sorted((two / "unbroken").glob("model_*.pth"))[0]
    shutil.copy(checkpoint, tmp_path / checkpoint.name)
    run(small_cfg(tmp_path), resume=True)
    assert read_metrics(tmp_path)[-1]["iteration"] == 8


@pytest.mark.slow
def test_an_error_of_one_rank_is_one_line_in_all(tmp_path):
    """The other rank loses its connection; only torchrun's own report has a traceback."""
    write_image_folder(tmp_path / "data")
    for image in sorted((tmp_path / "data" / "train").rglob("*.*")):
        image.write_bytes(image.read_bytes()[:-40])
        break
    line = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "tools/train_cls.py",
        "DATASETS.NAME", "folder", "DATASETS.ROOT", tmp_path / "data", "INPUT.SIZE", 32, "MODEL.STUDENT.NAME",
        "resnet8", "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 1, "OUTPUT_DIR", tmp_path / "run",
        "SOLVER.EPOCHS", 1, "SOLVER.IMS_PER_BATCH", 4,
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, line)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.stderr.count(f"error: cannot read image {image}: ") == done.stderr.count("error: ") == 1, done.stderr
    assert done.returncode and done.stderr.count("Traceback") == 1 and "exitcode  : 2" in done.stderr, done.stderr


def launch_two(folder, case):
    """As on a machine with two GPUs, which the processes that it starts do not find: they use gloo."""
    torch.cuda.device_count = lambda: 2
    launch(main, (folder, [case]), processes_to_start(2))


@pytest.mark.slow
def test_num_gpus_forwards_sigterm_and_exits_143(tmp_path):
    output = tmp_path / "output.txt"
    code = exit_code(start(launch_two, str(tmp_path), "parent stopped", output=output))
    assert code == 143 and "Traceback" not in output.read_text(), output.read_text()
    folder = tmp_path / "parent stopped"
    logs = [(folder / name).read_text() for name in ("log.txt", "log.txt.rank1")]
    # After the same step, or in the same evaluation.
    said = [re.findall(r"SIGTERM: (.*);", log) for log in logs]
    assert said[0] == said[1] and len(said[0]) == 1 and [*folder.glob("model_*.pth")]


@pytest.mark.slow
def test_slurm_tasks_train_as_torchrun_does(two, tmp_path):
    cfg = small_cfg(tmp_path / "run", LOG_PERIOD=4, SOLVER__CHECKPOINT_STEPS=0)
    (tmp_path / "c.yaml").write_text(cfg.dump())
    arguments = ("debug", "name", tmp_path / "c.yaml", tmp_path / "run")
    done, _ = slurm(tmp_path, "slurm_train.sh", *arguments, "SOLVER.EPOCHS", 3, srun=RUN_TWO_TASKS, GPUS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_identical(state(tmp_path / "run"), state(two / "unbroken"))
