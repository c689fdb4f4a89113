"""A run that was stopped in any way and resumed is the run that never stopped, to the last bit."""

import json
import math
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase

from d2distill.classification.trainer import build_trainer, load_datasets
from d2distill.common.engine.checkpoint import RunCheckpointer, save_student, write_atomically
from d2distill.common.engine.folder_lock import lock_folder
from d2distill.common.engine.run_folder import prepare_run
from d2distill.common.engine.writers import drop_lines_from, read_metrics
from d2distill.common.errors import CheckpointError, ConfigError, DataError, DivergedError, OutputError
from tests.classification.tiny_training import STEPS, run, run_disturbed, small_cfg, state
from tests.interruptions import assert_identical, fail_in_evaluation
from tests.processes import exit_code, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(small_cfg(folder))
    return folder


@pytest.fixture
def finished(tmp_path, unbroken_folder):
    """A run folder of one's own."""
    return shutil.copytree(unbroken_folder, tmp_path / "run")


@pytest.fixture(scope="module")
def unbroken(unbroken_folder):
    return state(unbroken_folder)


@pytest.mark.parametrize(
    ("moment", "step", "workers"),
    [
        ("before saving", 1, 0),  # nothing saved yet
        ("before saving", 6, 2),
        ("while saving", 6, 0),
        ("after saving", 5, 2),  # the checkpoint of a step in the middle of an epoch and of a log period
        ("after saving", 6, 0),  # neither evaluated nor logged
        ("after evaluating", 6, 2),  # not logged
        ("after writing", 6, 0),
        ("after writing", STEPS, 2),  # no results yet
    ],
)
def test_sigkill(tmp_path, unbroken, moment, step, workers):
    cfg = small_cfg(tmp_path, workers)
    assert exit_code(start(run_disturbed, cfg, moment, step)) == -signal.SIGKILL
    run(cfg, resume=True)
    assert_identical(state(tmp_path), unbroken)
    assert not list(tmp_path.glob("*.tmp"))


def test_sigterm_finishes_the_step_saves_and_exits_143(tmp_path, unbroken):
    process = start(run_disturbed, small_cfg(tmp_path, 2), "slowly", 0)
    while not read_metrics(tmp_path):
        time.sleep(0.05)
        assert process.is_alive()
    process.terminate()
    assert exit_code(process) == 143
    saved = max(int(path.stem.split("_")[1]) for path in tmp_path.glob("model_*.pth"))
    assert 0 < saved < STEPS
    run(small_cfg(tmp_path), resume=True)
    assert_identical(state(tmp_path), unbroken)


@pytest.mark.parametrize("step", [3, STEPS])
def test_sigterm_in_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, unbroken, step):
    assert exit_code(start(run_disturbed, small_cfg(tmp_path), "in evaluation", step)) == 143
    assert (tmp_path / f"model_{step:07d}.pth").exists()
    run(small_cfg(tmp_path), resume=True)
    assert_identical(state(tmp_path), unbroken)


@pytest.mark.parametrize("step", [3, STEPS])
def test_an_error_in_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, unbroken, step):
    cfg = small_cfg(tmp_path)
    for resumed in (False, True):
        trainer = build_trainer(cfg, *load_datasets(cfg))
        fail_in_evaluation(trainer, step, DataError("cannot read image 7.jpg"))
        with pytest.raises(DataError, match=r"cannot read image 7\.jpg"):
            trainer.run(resumed)
        assert trainer.checkpointer.files()[0].name == f"model_{step:07d}.pth"
    run(cfg, resume=True)
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
    del saved["has_digest"]
    trainer = build_trainer(cfg, *load_datasets(cfg))
    for part, name in (
        ("settings", "SOLVER.IMS_PER_BATCH"),
        ("settings", "DISTILL.METHODS"),
        ("run_identity", "training samples"),
        ("run_identity", "classes"),
        ("run_identity", "the teacher's weights"),
    ):
        torch.save({**saved, part: {**saved[part], name: "other"}}, path)
        with pytest.raises(CheckpointError, match=f"{name} was 'other', now"):
            trainer.resume()
    torch.save(saved, path)
    assert trainer.resume() == 3


def test_the_time_of_a_run_is_that_of_all_its_parts(tmp_path):
    run(small_cfg(tmp_path, SOLVER__EPOCHS=1))
    (path,) = tmp_path.glob("model_*3.pth")
    saved = torch.load(path, weights_only=True)
    saved["trainer"]["seconds"] = 1000.0
    del saved["has_digest"]
    torch.save(saved, path)
    run(small_cfg(tmp_path, SOLVER__EPOCHS=2), resume=True)
    assert 1000 < json.loads((tmp_path / "results.json").read_text())["seconds"] < 2000


def test_epochs_are_counted_from_1(tmp_path):
    cfg, epochs = small_cfg(tmp_path), []
    trainer = build_trainer(cfg, *load_datasets(cfg))
    for distiller in trainer.task.model.distillers.values():
        distiller.register_forward_pre_hook(lambda module, args: epochs.append(args[2].progress.time))
    trainer.run()
    assert epochs == [1] * 6 + [2] * 6 + [3] * 6  # of two methods


def test_methods_are_told_the_class_of_every_sample(tmp_path):
    cfg = small_cfg(tmp_path, DISTILL__METHODS=["CRD"], DISTILL__CRD__K=8)
    train_set, test_set = load_datasets(cfg)
    method = build_trainer(cfg, train_set, test_set).task.model.distillers["crd"]
    assert torch.equal(method.labels, train_set.labels)


def test_what_a_process_does_before_a_run(tmp_path, monkeypatch):
    """One that Detectron2 started has imported nothing yet."""
    (tmp_path / "own.py").write_text("import os\nos.environ['IMPORTED_HERE'] = 'yes'\n")
    monkeypatch.setenv("IMPORTED_HERE", "")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    cfg = small_cfg(tmp_path / "run", CUDNN_BENCHMARK=True, IMPORTS=[str(tmp_path / "own.py")])
    with prepare_run(cfg, resume=False):
        assert os.environ["IMPORTED_HERE"] == "yes" and torch.backends.cudnn.benchmark


def test_a_run_can_be_made_longer(tmp_path):
    run(small_cfg(tmp_path))
    run(small_cfg(tmp_path, SOLVER__EPOCHS=4), resume=True)
    assert [line["iteration"] for line in read_metrics(tmp_path)][-1] == 11


def test_other_settings_of_the_solver_hold_from_there_on(tmp_path):
    run(small_cfg(tmp_path, SOLVER__EPOCHS=1))
    solver = {"SOLVER.BASE_LR": 0.004, "SOLVER.WEIGHT_DECAY": 0.0, "SOLVER.LR_SCHEDULE": "cosine", "LOG_PERIOD": 1}
    run(small_cfg(tmp_path, **solver), resume=True)
    rates = [line["lr"] for line in read_metrics(tmp_path)]
    assert rates == pytest.approx([0.05, 0.05, *(0.002 * (1 + math.cos(math.pi * k / STEPS)) for k in range(3, STEPS))])
    last = torch.load(tmp_path / f"model_{STEPS:07d}.pth", weights_only=True)["trainer"]
    (group,) = last["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"], group["initial_lr"]) == (0.0, 0.9, 0.004)
    (line,) = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "other settings apply" in line]
    assert (
        "from step 3 on" in line
        and "SOLVER.BASE_LR was 0.05, now 0.004" in line
        and "SOLVER.EPOCHS was 1, now 3" in line
    )
    assert "SOLVER.LR_SCHEDULE was 'step', now 'cosine'" in line and "SOLVER.WEIGHT_DECAY was 0.0005, now 0.0" in line
    assert "OUTPUT_DIR" not in line and "MOMENTUM" not in line


def test_a_divergence_ends_where_the_rate_is_lowered(tmp_path):
    run(small_cfg(tmp_path, SOLVER__EPOCHS=1))
    with pytest.raises(DivergedError, match=r"continues from .*/model_0000003\.pth( \(delete|$)"):
        run(small_cfg(tmp_path, SOLVER__BASE_LR=1e20), resume=True)
    run(small_cfg(tmp_path, SOLVER__BASE_LR=1e-3), resume=True)
    assert [line["lr"] for line in read_metrics(tmp_path)][2:] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SOLVER.EPOCHS": 2}, "3 epochs are done in .*/run, more than the 2 epochs asked for"),
        ({"SOLVER.OPTIMIZER": "AdamW"}, "SOLVER.OPTIMIZER was 'SGD', now 'AdamW'"),
        ({"SOLVER.OPTIMIZER": "DOT"}, "SOLVER.OPTIMIZER was 'SGD', now 'DOT'"),
        ({"SOLVER.AMP": "fp16"}, "SOLVER.AMP was '', now 'fp16'"),
        ({"MODEL.STUDENT.NAME": "resnet14"}, "MODEL.STUDENT.NAME was 'resnet8', now 'resnet14'"),
        ({"MODEL.TEACHER.NAME": "resnet8"}, "MODEL.TEACHER.NAME was 'wrn_16_1', now 'resnet8'"),
        ({"MODEL.STUDENT.PIXEL_MEAN": [1.0, 1.0, 1.0]}, r"MODEL.STUDENT.PIXEL_MEAN was \[.*\], now \[1.0, 1.0, 1.0\]"),
        ({"INPUT.SIZE": 24}, "INPUT.SIZE was 16, now 24"),
        ({"INPUT.AUGMENTATION": "none"}, "INPUT.AUGMENTATION was '', now 'none'"),
        ({"MODEL.SYNC_BN": True}, "MODEL.SYNC_BN was False, now True"),
        ({"DISTILL.KD.T": 2.0}, "DISTILL.KD.T was 4.0, now 2.0"),
    ],
)
def test_what_would_be_another_run_is_not_resumed(finished, settings, message):
    before = (finished / "config.yaml").read_bytes()
    with pytest.raises((CheckpointError, ConfigError), match=message):
        run(small_cfg(finished, **settings), resume=True)
    assert (finished / "config.yaml").read_bytes() == before


def test_a_finished_run_keeps_its_settings(finished):
    before = (finished / "config.yaml").read_bytes()
    run(small_cfg(finished, SOLVER__BASE_LR=0.1), resume=True)
    assert (finished / "config.yaml").read_bytes() == before
    log = (finished / "log.txt").read_text()
    assert "All 3 epochs are done already" in log and "have no effect: SOLVER.BASE_LR was 0.05, now 0.1" in log


def change_model(data):
    data["model"].update(x=data["model"].pop("student.fc.bias"), y=torch.ones(1), z=torch.ones(1))


def change_momentum(data):
    data["trainer"]["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("trainer"), "is no checkpoint of such a run: it has no 'trainer'"),
        (lambda data: data.update(settings=None), "is no checkpoint of such a run: it has no 'settings'"),
        (lambda data: data["trainer"].update(iteration=-5), "was made after another step than its name says"),
        (lambda data: data["trainer"].update(iteration=math.nan), "was made after another step than its name says"),
        (lambda data: data["trainer"].update(optimizer={}), "its 'trainer' does not fit: 'param_groups'"),
        (lambda data: data["model"].update({"student.fc.bias": None}), "its 'model' does not fit: 'NoneType'"),
        (change_momentum, "its 'trainer' does not fit: the optimizer's momentum_buffer does not fit parameter 0"),
        (lambda data: data["model"]["student.fc.bias"].fill_(math.nan), "is not finite: student.fc.bias has NaN"),
        (change_model, r"is of another model: 1 missing \(student\.fc\.bias\); 3 unexpected \(x, y, z\); choose"),
    ],
)
def test_a_checkpoint_of_something_else(finished, change, message):
    path = finished / f"model_{STEPS:07d}.pth"
    data = torch.load(path, weights_only=True)
    for other in finished.glob("model_*.pth"):
        other.unlink()
    # As of a version that wrote no digests: of others it is noticed that they were changed.
    del data["has_digest"]
    change(data)
    torch.save(data, path)
    with pytest.raises(CheckpointError, match=f"{path}:? {message}") as error:
        run(small_cfg(finished), resume=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


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


def test_a_temporary_file_is_nobody_elses(tmp_path, monkeypatch):
    """It does not follow a link that stands where it is to be, and what it becomes is as others may read it."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name in (f"file.{os.getpid()}.tmp", "file.known.tmp"):
        (tmp_path / name).symlink_to(victim)
    write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    assert victim.read_bytes() == b"precious"
    umask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    finally:
        os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    monkeypatch.setattr("d2distill.common.engine.checkpoint.token_hex", lambda length: "known")
    with pytest.raises(OutputError, match="File exists"):
        write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    assert victim.read_bytes() == b"precious"


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


@pytest.mark.parametrize("values", [10**6, 24990])  # torch fails in another place where only the end does not fit
def test_a_full_disk_is_said_in_one_line(tmp_path, values):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            OutputError, match=r"student\.pth cannot be written: File too large; check free space"
        ) as error:
            save_student(tmp_path / "student.pth", {"weight": torch.zeros(values)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_is_said_in_one_line(tmp_path, monkeypatch):
    def fail(writer):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d2distill.common.engine.writers.JSONWriter.write", fail)
    with pytest.raises(OutputError, match=f"the run's log in {tmp_path} cannot be written: No space left on device"):
        run(small_cfg(tmp_path))


@pytest.mark.parametrize("folder", ["{file}", "{file}/below", "/proc/nowhere/run"])
def test_a_run_folder_that_cannot_be_is_said_before_anything_is_read(tmp_path, monkeypatch, folder):
    (tmp_path / "file").touch()
    folder = folder.format(file=tmp_path / "file")
    monkeypatch.setattr("d2distill.classification.trainer.load_datasets", None)
    with pytest.raises(ConfigError, match=f"OUTPUT_DIR {folder} cannot be used: .*; choose one"):
        run(small_cfg(folder))


def test_a_run_folder_in_use_is_left_alone(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with lock_folder(folder):
        (folder / "log.txt").write_text("of the other run")
        monkeypatch.setattr("d2distill.classification.trainer.load_datasets", None)
        for resume in (False, True):
            with pytest.raises(ConfigError, match=f"OUTPUT_DIR {folder} is in use by process {os.getpid()} on"):
                run(small_cfg(folder), resume)
        assert (folder / "log.txt").read_text() == "of the other run"


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    checkpointer = RunCheckpointer(torch.nn.Linear(2, 2), str(tmp_path), keep=2)
    for step in (10000000, 3, 9999999):
        checkpointer.save(f"model_{step:07d}", settings={}, run_identity={})
    assert [path.name for path in checkpointer.files()] == ["model_10000000.pth", "model_9999999.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_9999999.pth"
    (tmp_path / "model_10000001.pth.77.tmp").write_bytes(b"half")
    assert checkpointer.latest()[0].name == "model_10000000.pth"


# Of losses and weights, or of what the student makes of the test images.
BROKEN = "(became infinite or NaN|logits of 500 of 500 test images are not finite)"


def saved_weights(folder):
    return [torch.load(path, weights_only=True)["model"] for path in folder.glob("*.pth")]


@pytest.mark.parametrize(
    ("rate", "hint"),
    [
        (1e10, r"continues from .*/model_0000001\.pth$"),  # infinite statistics before any loss is
        (1e3, r"continues from .*/model_000000\d\.pth \(delete it to continue from the one before\)$"),
    ],
)
def test_nothing_is_saved_that_is_not_finite(tmp_path, rate, hint):
    settings = {"SOLVER.CHECKPOINT_STEPS": 1, "LOG_PERIOD": 100, "SOLVER.EPOCHS": 9, "SOLVER.STEPS": []}
    with pytest.raises(DivergedError, match=f"{BROKEN}.* Lower SOLVER.BASE_LR.*; .*{hint}") as error:
        run(small_cfg(tmp_path, SOLVER__BASE_LR=rate, **settings))
    assert all(tensor.isfinite().all() for weights in saved_weights(tmp_path) for tensor in weights.values())
    assert (tmp_path / "log.txt").read_text().count(str(error.value)) == 1


def test_a_run_that_diverged_before_its_first_checkpoint(tmp_path):
    with pytest.raises(DivergedError, match=r"there is no checkpoint yet: start again$"):
        run(small_cfg(tmp_path, SOLVER__BASE_LR=1e10, SOLVER__CHECKPOINT_STEPS=0))


@pytest.mark.parametrize(
    ("source", "settings", "error"),
    [
        ("the student's outputs", {"SOLVER.BASE_LR": 1e30}, DivergedError),
        ("the teacher's outputs", {}, CheckpointError),
        ("loss_kd", {"DISTILL.KD.T": 1e-38}, DivergedError),
    ],
)
def test_what_is_not_finite_first_is_named(tmp_path, source, settings, error):
    cfg = small_cfg(tmp_path, SOLVER__CHECKPOINT_STEPS=0, TEST__EVAL_PERIOD=9, **settings)
    trainer = build_trainer(cfg, *load_datasets(cfg))
    if "teacher" in source:
        trainer.task.model.teacher.classifier_layer.bias[0] = float("nan")
    with pytest.raises(error, match=f"^{source} became infinite or NaN"):
        trainer.run()


class BreakHook(HookBase):
    def after_step(self):
        if self.trainer.iter + 1 == STEPS:
            self.trainer.task.model.student.fc.bias.data[0] = float("nan")


@pytest.mark.parametrize("last", [True, False])
def test_a_last_update_that_breaks_the_student_does_not_succeed(tmp_path, last):
    cfg = small_cfg(tmp_path, TEST__EVAL_PERIOD=3)
    trainer = build_trainer(cfg, *load_datasets(cfg))
    trainer.register_hooks([BreakHook()])
    if not last:  # but before the only evaluation, whose student is the best one then
        trainer._hooks.insert(0, trainer._hooks.pop())
    with pytest.raises(DivergedError, match=f"{BROKEN}.*/model_000000{9 if last else 6}\\.pth"):
        trainer.run()
    assert (tmp_path / "student_best.pth").exists() == last and not (tmp_path / "student_final.pth").exists()
    assert all(tensor.isfinite().all() for weights in saved_weights(tmp_path) for tensor in weights.values())


LINES = [b'{"iteration": 0}', b'{"iteration": 1}', b'{"iteration": 2}']


@pytest.mark.parametrize("text", [b'{"iteration": 1', b"\xff\xfe", b"\0\0\0\n\0\0", b""])
def test_a_log_with_something_else_in_it(tmp_path, text):
    path = tmp_path / "metrics.json"
    path.write_bytes(b"\n".join([*LINES, text]))
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [0, 1, 2]
    drop_lines_from(path, 2)
    assert path.read_bytes() == b"\n".join([*LINES[:2], b""])
