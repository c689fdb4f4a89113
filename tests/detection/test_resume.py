"""A detector's training that was stopped in any way and resumed is the one that never stopped, to the last bit."""

import math
import signal
import time

import pytest
import torch

from d2distill.common.engine.folder_lock import lock_folder
from d2distill.common.engine.writers import read_metrics
from d2distill.common.errors import CheckpointError, ConfigError, DivergedError
from d2distill.detection.data import load_training_set, register_datasets
from d2distill.detection.trainer import build_trainer, evaluate
from tests.detection.tiny_detectors import small_cfg
from tests.detection.tiny_training import STEPS, run, run_disturbed, state, tiny_cfg
from tests.interruptions import assert_identical, fail_in_evaluation
from tests.processes import exit_code, start
from tests.report_pages import open_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny):
    """The state of an unbroken run of each architecture."""
    states = {}
    for name in ("rcnn", "retinanet"):
        folder = tmp_path_factory.mktemp(name)
        run(tiny_cfg(name, folder))
        states[name] = state(folder)
    return states


@pytest.mark.parametrize(
    ("name", "moment", "step", "workers"),
    [
        ("rcnn", "before saving", 1, 0),  # nothing saved yet
        ("rcnn", "before saving", 5, 2),
        ("rcnn", "after evaluating", 6, 0),
        ("rcnn", "while saving", 4, 2),
        ("rcnn", "after saving", 2, 0),
        ("rcnn", "after writing", STEPS, 0),
        ("retinanet", "before saving", 3, 0),  # its running normalizer is no buffer
        ("retinanet", "while saving", 4, 2),
    ],
)
def test_sigkill(tmp_path, unbroken, name, moment, step, workers):
    cfg = tiny_cfg(name, tmp_path, workers)
    assert exit_code(start(run_disturbed, cfg, moment, step)) == -signal.SIGKILL
    run(cfg, resume=True)
    assert_identical(state(tmp_path), unbroken[name])
    assert not list(tmp_path.glob("*.tmp"))


def test_sigterm_finishes_the_step_saves_and_exits_143(tmp_path, unbroken):
    process = start(run_disturbed, tiny_cfg("rcnn", tmp_path, 2), "slowly", 0)
    while not read_metrics(tmp_path):
        time.sleep(0.05)
        assert process.is_alive()
    process.terminate()
    assert exit_code(process) == 143
    run(tiny_cfg("rcnn", tmp_path), resume=True)
    assert_identical(state(tmp_path), unbroken["rcnn"])


@pytest.mark.parametrize("step", [3, STEPS])
def test_sigterm_in_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, unbroken, step):
    assert exit_code(start(run_disturbed, tiny_cfg("rcnn", tmp_path), "in evaluation", step)) == 143
    assert (tmp_path / f"model_{step:07d}.pth").exists()
    run(tiny_cfg("rcnn", tmp_path), resume=True)
    assert_identical(state(tmp_path), unbroken["rcnn"])


def test_an_error_in_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, unbroken):
    """Whatever it is, also a fault of the program."""
    cfg = tiny_cfg("rcnn", tmp_path)
    register_datasets(cfg)
    for resumed in (False, True):
        trainer = build_trainer(cfg, load_training_set(cfg))
        fail_in_evaluation(trainer, 3, KeyError("area"))
        with pytest.raises(KeyError, match="area"):
            trainer.run(resumed)
        assert trainer.checkpointer.files()[0].name == "model_0000003.pth"
    run(cfg, resume=True)
    assert_identical(state(tmp_path), unbroken["rcnn"])


def test_a_run_folder_in_use_is_left_alone(tmp_path, tiny):
    cfg = tiny_cfg("rcnn", tmp_path)
    with lock_folder(tmp_path):
        for call in (run, lambda cfg: run(cfg, resume=True), evaluate):
            with pytest.raises(ConfigError, match=f"OUTPUT_DIR {tmp_path} is in use by process .*; wait for it, stop"):
                call(cfg)
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_workers_change_nothing(tmp_path, unbroken):
    run(tiny_cfg("rcnn", tmp_path, workers=2))
    assert_identical(state(tmp_path), unbroken["rcnn"])


def test_the_run_folder(tmp_path, tiny):
    cfg = tiny_cfg("rcnn", tmp_path, REPORT__ENABLED=True)
    results = run(cfg)
    page = open_page(tmp_path / "report.html").sections
    assert f"{results['bbox/AP']:.2f}" in page["Results"] and "5" in page["Classes"].split()
    assert (
        "loss_rpn_cls" in page["Curves"]
        and "detection · GeneralizedRCNN" in page[""]
        and "of the teacher" in page[list(page)[4]]
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.yaml", "environment.txt", "log.txt", "metrics.json", "results.json"} < names
    assert {"student_best.pth", "student_final.pth", "last_checkpoint", f"model_{STEPS:07d}.pth"} < names
    assert {"bbox/AP", "bbox/AP50", "bbox/AP75", "bbox/APs", "bbox/APm", "bbox/APl", "best_bbox/AP"} <= set(results)
    # Also of an evaluation between two log periods.
    assert [line["iteration"] for line in read_metrics(tmp_path) if "bbox/AP" in line] == [2, STEPS - 1]
    last = read_metrics(tmp_path)[-1]
    assert last["iteration"] == STEPS - 1 and {"loss_dkd", "loss_reviewkd", "loss_cls", "lr", "bbox/AP"} <= set(last)
    saved = torch.load(tmp_path / f"model_{STEPS:07d}.pth", weights_only=True)
    assert not [key for key in saved["model"] if key.startswith("teacher.")]
    assert [key for key in saved["model"] if key.startswith("distillers.")]
    student = torch.load(tmp_path / "student_final.pth", weights_only=True)["model"]
    assert {key.split(".")[0] for key in student} == {"backbone", "proposal_generator", "roi_heads"}


def test_the_teacher_is_as_it_was_loaded_even_after_a_restart(tmp_path, tiny, monkeypatch):
    from d2distill.detection import trainer

    built = []
    monkeypatch.setattr(
        trainer, "build_model", lambda cfg, build=trainer.build_model: built.append(build(cfg)) or built[0]
    )
    cfg = tiny_cfg("rcnn", tmp_path)
    run(tiny_cfg("rcnn", tmp_path))
    built.clear()
    run(cfg, resume=True)
    file = torch.load(cfg.TEACHER.MODEL.WEIGHTS, weights_only=True)["model"]
    assert all(torch.equal(value, file[name]) for name, value in built[0].teacher.state_dict().items())


def test_what_cannot_be_resumed(tmp_path, tiny):
    run(tiny_cfg("rcnn", tmp_path))
    with pytest.raises(ConfigError, match="--resume"):
        run(tiny_cfg("rcnn", tmp_path))
    with pytest.raises(CheckpointError, match="SEED was 3, now 4"):
        run(tiny_cfg("rcnn", tmp_path, SEED=4), resume=True)
    with pytest.raises(ConfigError, match=r"6 iterations are done in .*, more than the 5 iterations asked for"):
        run(tiny_cfg("rcnn", tmp_path, SOLVER__MAX_ITER=5), resume=True)
    with pytest.raises(CheckpointError, match=r"SOLVER\.AMP\.ENABLED was False, now True"):
        run(tiny_cfg("rcnn", tmp_path, SOLVER__AMP__ENABLED=True), resume=True)


def test_other_settings_of_the_solver_hold_from_there_on(tmp_path, tiny):
    flat = {"SOLVER.WARMUP_ITERS": 0, "SOLVER.STEPS": ()}
    run(tiny_cfg("rcnn", tmp_path, SOLVER__MAX_ITER=2, **flat))
    run(tiny_cfg("rcnn", tmp_path, SOLVER__MAX_ITER=4, SOLVER__BASE_LR=1e-5, **flat), resume=True)
    first, *_, last = (line["lr"] for line in read_metrics(tmp_path))
    assert (first, last) == (small_cfg().SOLVER.BASE_LR, pytest.approx(1e-5))
    log = (tmp_path / "log.txt").read_text()
    assert f"SOLVER.BASE_LR was {first}, now 1e-05" in log and "SOLVER.MAX_ITER was 2, now 4" in log
    assert "OUTPUT_DIR" not in log


def test_a_teacher_without_weights(tmp_path, tiny):
    with pytest.raises(ConfigError, match=r"TEACHER\.MODEL\.WEIGHTS is empty"):
        run(tiny_cfg("rcnn", tmp_path, **{"TEACHER.MODEL.WEIGHTS": ""}))


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, tiny):
    with pytest.raises(DivergedError, match=r"(infinite|diverged).* Lower SOLVER.BASE_LR"):
        run(tiny_cfg("rcnn", tmp_path, SOLVER__BASE_LR=1e30, SOLVER__WARMUP_ITERS=0))
    for path in tmp_path.glob("model_*.pth"):
        weights = torch.load(path, weights_only=True)["model"].values()
        assert all(math.isfinite(value.double().sum()) for value in weights)


def test_detecting_nothing_is_an_average_precision_of_zero(tmp_path, tiny):
    results = run(tiny_cfg("rcnn", tmp_path, **{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 1.0}))
    assert results["bbox/AP"] == results["best_bbox/AP"] == results["bbox/APl"] == 0.0
    assert (tmp_path / "student_best.pth").exists()
