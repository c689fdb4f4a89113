"""A run that was stopped in any way and resumed is the run that never stopped, to the last bit."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from classification.trainer import ClassificationTrainer, load_datasets
from common.engine.checkpoint import RunCheckpointer, write_atomically
from common.engine.run import prepare_run
from common.engine.writers import read_metrics
from common.errors import CheckpointError, ConfigError
from tests.classification.runs import STEPS, run, small_cfg, state
from tests.restarts import assert_identical

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(small_cfg(folder))
    return state(folder)


def start(folder, workers, moment, step):
    command = [sys.executable, "-m", "tests.classification.runs", str(folder), str(workers), moment, str(step)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("before hooks", 1),  # nothing saved yet
        ("before hooks", 5),  # in the middle of an epoch
        ("before saving", 6),  # at an epoch's end: evaluated and logged, but not saved
        ("while saving", 6),
        ("after saving", 5),  # the checkpoint of a step in the middle of an epoch and of a log period
        ("after saving", STEPS),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_sigkill(tmp_path, unbroken, moment, step, workers):
    assert start(tmp_path, workers, moment, step).wait() == -signal.SIGKILL
    run(small_cfg(tmp_path, workers), resume=True)
    assert_identical(state(tmp_path), unbroken)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
def test_sigterm_finishes_the_step_saves_and_exits_143(tmp_path, unbroken):
    process = start(tmp_path, 2, "slowly", 0)
    while not read_metrics(tmp_path):
        time.sleep(0.05)
        assert process.poll() is None
    process.terminate()
    assert process.wait() == 143
    saved = max(int(path.stem.split("_")[1]) for path in tmp_path.glob("model_*.pth"))
    assert 0 < saved < STEPS
    run(small_cfg(tmp_path), resume=True)
    assert_identical(state(tmp_path), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, STEPS])
def test_sigterm_in_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, unbroken, step):
    assert start(tmp_path, 0, "in evaluation", step).wait() == 143
    assert (tmp_path / f"model_{step:07d}.pth").exists()
    run(small_cfg(tmp_path), resume=True)
    assert_identical(state(tmp_path), unbroken)


def test_workers_change_nothing(tmp_path, unbroken):
    run(small_cfg(tmp_path, workers=2))
    assert_identical(state(tmp_path), unbroken)


def test_another_seed_changes_everything(tmp_path, unbroken):
    run(small_cfg(tmp_path, SEED=4))
    assert not torch.equal(state(tmp_path)[0]["fc.weight"], unbroken[0]["fc.weight"])


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_checkpoint_falls_back(tmp_path, unbroken, damage):
    run(small_cfg(tmp_path))
    newest = tmp_path / f"model_{STEPS:07d}.pth"
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    newest.write_bytes({"cut": content[:-100], "flipped": content, "empty": b""}[damage])
    run(small_cfg(tmp_path), resume=True)
    # Detectron2's loggers do not propagate, so that pytest sees nothing of them.
    assert f"{newest} is damaged" in (log := (tmp_path / "log.txt").read_text()) and "checkpoint before it" in log
    assert_identical(state(tmp_path), unbroken)


def test_all_checkpoints_damaged(tmp_path):
    run(small_cfg(tmp_path))
    for path in tmp_path.glob("model_*.pth"):
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        run(small_cfg(tmp_path), resume=True)


def test_a_finished_run_is_left_alone(tmp_path):
    results = run(small_cfg(tmp_path))
    before = state(tmp_path)
    assert run(small_cfg(tmp_path), resume=True) == results
    assert_identical(state(tmp_path), before)


def test_a_run_is_not_written_over(tmp_path):
    run(small_cfg(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="--resume"):
        run(small_cfg(tmp_path))
    with pytest.raises(CheckpointError, match="SEED was 3, now 4"):
        run(small_cfg(tmp_path, SEED=4), resume=True)
    after = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "log.txt"}
    assert all(before[path] == content for path, content in after.items())


def test_another_run_is_not_resumed(tmp_path):
    cfg = small_cfg(tmp_path, SOLVER__EPOCHS=1)
    run(cfg)
    (path,) = tmp_path.glob("model_*3.pth")
    saved = torch.load(path, weights_only=True)
    trainer = ClassificationTrainer(cfg, *load_datasets(cfg))
    names = ["SOLVER.IMS_PER_BATCH", "DATASETS.TRAIN_SIZE", "MODEL.STUDENT.NAME", "DISTILL.METHODS", "training samples"]
    for name in names:
        for other, was in ({**saved, name: "other"}, "'other'"), ({k: v for k, v in saved.items() if k != name}, None):
            torch.save(other, path)
            with pytest.raises(CheckpointError, match=f"{name} was {was}, now"):
                trainer.resume()
    torch.save(saved, path)
    assert trainer.resume() == 3


def test_the_time_of_a_run_is_that_of_all_its_parts(tmp_path):
    run(small_cfg(tmp_path, SOLVER__EPOCHS=1))
    (path,) = tmp_path.glob("model_*3.pth")
    saved = torch.load(path, weights_only=True)
    saved["trainer"]["seconds"] = 1000.0
    torch.save(saved, path)
    run(small_cfg(tmp_path, SOLVER__EPOCHS=2), resume=True)
    assert 1000 < json.loads((tmp_path / "results.json").read_text())["seconds"] < 2000


def test_epochs_are_counted_from_1(tmp_path):
    cfg, epochs = small_cfg(tmp_path), []
    trainer = ClassificationTrainer(cfg, *load_datasets(cfg))
    for distiller in trainer.distill_model.distillers.values():
        distiller.register_forward_pre_hook(lambda module, args: epochs.append(args[3].time))
    trainer.run()
    assert epochs == [1] * 6 + [2] * 6 + [3] * 6  # of two methods


def test_methods_are_told_the_class_of_every_sample(tmp_path):
    cfg = small_cfg(tmp_path, DISTILL__METHODS=["CRD"], DISTILL__CRD__K=8)
    train_set, test_set = load_datasets(cfg)
    method = ClassificationTrainer(cfg, train_set, test_set).distill_model.distillers["crd"]
    assert torch.equal(method.labels, train_set.labels) and method.all_known


def test_what_a_process_does_before_a_run(tmp_path, monkeypatch):
    """One that Detectron2 started has imported nothing yet."""
    (tmp_path / "own.py").write_text("import os\nos.environ['IMPORTED_HERE'] = 'yes'\n")
    monkeypatch.setenv("IMPORTED_HERE", "")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    cfg = small_cfg(tmp_path / "run", CUDNN_BENCHMARK=True, IMPORTS=[str(tmp_path / "own.py")])
    prepare_run(cfg, argparse.Namespace(resume=False))
    assert os.environ["IMPORTED_HERE"] == "yes" and torch.backends.cudnn.benchmark


def test_more_epochs_go_on(tmp_path):
    run(small_cfg(tmp_path))
    run(small_cfg(tmp_path, SOLVER__EPOCHS=4), resume=True)
    assert [line["iteration"] for line in read_metrics(tmp_path)][-1] == 11


def test_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    path, events = tmp_path / "file", []

    def fsync(file):
        name = Path(os.readlink(f"/proc/self/fd/{file}"))
        events.append((name, name.read_bytes() if name.is_file() else path.read_bytes()))

    monkeypatch.setattr(os, "fsync", fsync)
    path.write_bytes(b"old")
    write_atomically(path, lambda file: file.write(b"new"))
    (temporary, content), folder = events
    assert temporary.parent == tmp_path and temporary != path and content == b"new"
    assert folder == (tmp_path, b"new")  # the rename as well, once it was made


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    checkpointer = RunCheckpointer(torch.nn.Linear(2, 2), str(tmp_path), keep=2)
    for step in (10000000, 3, 9999999):
        checkpointer.save(f"model_{step:07d}")
    assert [path.name for path in checkpointer.files()] == ["model_10000000.pth", "model_9999999.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_9999999.pth"
    (tmp_path / "model_10000001.pth.77.tmp").write_bytes(b"half")
    assert checkpointer.resume() == {} and not list(tmp_path.glob("*.tmp"))
