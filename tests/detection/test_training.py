"""Trainings of other kinds than those that are stopped and resumed: masks, mixed precision, merged files."""

import gc
import json
import weakref
from importlib.util import find_spec

import pytest
import torch
import yaml
from detectron2.data import MetadataCatalog
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import get_event_storage

from d2distill.common.errors import ConfigError
from d2distill.detection.config import load_cfg
from d2distill.detection.data import load_training_set, register_datasets
from d2distill.detection.trainer import build_trainer
from tests.detection.tiny_detectors import SMALL, TEACHER, build, small_cfg
from tests.detection.tiny_training import count_reads, run, tiny_cfg
from tests.interruptions import assert_identical

pytestmark = pytest.mark.slow


SHORT = {"SOLVER.MAX_ITER": 2, "SOLVER.STEPS": (1,), "TEST.EVAL_PERIOD": 0}


def test_masks(tiny, tmp_path):
    masks = {"MODEL.MASK_ON": True, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0, "DISTILL.METHODS": ["ReviewKD"]}
    cfg = tiny_cfg("rcnn", tmp_path, **SHORT, **masks)
    results = run(cfg)
    assert {"bbox/AP", "segm/AP", "segm/AP50", "best_segm/AP"} <= set(results)
    written = json.loads((tmp_path / "results.json").read_text())
    assert (
        set(written["per_class"])
        == set(written["per_class_segm"])
        == set(MetadataCatalog.get("tiny_val").thing_classes)
    )
    # What is no metric is no result either.
    cfg.TEST.EXPECTED_RESULTS = [["segm", "AP", results["segm/AP"], 0.01], ["best_bbox", "AP50", 50, 100]]
    assert run(cfg, resume=True).keys() == results.keys()
    assert "Results verification passed" in (tmp_path / "log.txt").read_text()
    for wrong in (["segm", "AP", 101, 0.5], ["mask", "AP", 50, 50]):
        cfg.TEST.EXPECTED_RESULTS = [wrong]
        with pytest.raises(SystemExit, match="1"):
            run(cfg, resume=True)
    assert "Expected Results: [['segm', 'AP', 101, 0.5]]" in (tmp_path / "log.txt").read_text()


def test_mixed_precision(tiny, tmp_path):
    """bf16 on CPUs, fp16 with loss scaling on GPUs; losses and weights stay fp32."""
    cfg = tiny_cfg("rcnn", tmp_path, **SHORT, **{"SOLVER.AMP.ENABLED": True})
    register_datasets(cfg)
    trainer = build_trainer(cfg, load_training_set(cfg))
    assert trainer.task.precision is torch.bfloat16
    trainer.run()
    student = torch.load(tmp_path / "student_final.pth", weights_only=True)["model"]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in student.values() if value.ndim)


def test_a_trainer_keeps_the_data_in_its_compact_form_alone(tiny, tmp_path):
    """COCO's training set takes gigabytes as a list of dicts, which every worker would come to copy."""

    class Dicts(list):  # which a weak reference can point to
        pass

    cfg = tiny_cfg("rcnn", tmp_path)
    register_datasets(cfg)
    dicts = Dicts(load_training_set(cfg))
    reference, expected = weakref.ref(dicts), [record["file_name"] for record in dicts]
    trainer = build_trainer(cfg, dicts)
    del dicts
    gc.collect()
    assert reference() is None
    batches = {start: next(iter(trainer.task.build_batches(start))) for start in (0, 2, 0)}
    assert all(record["file_name"] in expected for batch in batches.values() for record in batch)
    assert batches[0][0]["file_name"] != batches[2][0]["file_name"]


def test_every_process_evaluates_with_the_main_ones_statistics(tiny, tmp_path, monkeypatch):
    cfg, sent = tiny_cfg("rcnn", tmp_path), []
    register_datasets(cfg)
    trainer = build_trainer(cfg, load_training_set(cfg))
    monkeypatch.setattr("d2distill.detection.trainer.broadcast_buffers", sent.append)
    monkeypatch.setattr("d2distill.detection.trainer.evaluate_detector", lambda *_, **__: {"sent": list(sent)})
    assert trainer.evaluate() == {"sent": []}
    monkeypatch.setattr("d2distill.detection.trainer.comm.get_world_size", lambda: 2)
    (network,) = trainer.evaluate()["sent"]
    assert network.backbone is trainer.task.model.backbone and network.teacher is None


def test_over_scales_and_flips_at_the_end(tiny, tmp_path):
    augmented = {"TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": (96,), "TEST.AUG.FLIP": False}
    results = run(tiny_cfg("rcnn", tmp_path, **SHORT, **augmented))
    written = json.loads((tmp_path / "results.json").read_text())
    assert "bbox/AP_TTA" in results and set(results) < set(written)
    assert json.dumps(written, allow_nan=False)


def test_several_test_sets(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read = count_reads(monkeypatch)
    more = {"DATASETS.TEST": ("tiny_val", "tiny_train"), "TEST.TEACHER": True, "SOLVER.EMA_DECAY": 0.5}
    results = run(tiny_cfg("rcnn", tmp_path, **SHORT, **more))
    assert {"tiny_val/bbox/AP", "tiny_train/bbox/AP", "best_tiny_val/bbox/AP", "ema_tiny_val/bbox/AP"} <= set(results)
    assert (tmp_path / "student_best.pth").exists()
    written = json.loads((tmp_path / "results.json").read_text())
    assert set(written["per_class"]) == {"tiny_val", "tiny_train"}
    assert {"teacher_tiny_val/bbox/AP", "teacher_tiny_train/bbox/AP"} <= set(written)
    # By Detectron2's loader and by its evaluator; and to train on. The teacher, the student and its average share them.
    assert read == {"val.json": 2, "train.json": 3}


def test_pictures_of_the_training_reach_tensorboard(tiny, tmp_path, monkeypatch):
    if find_spec("cv2") is None:
        with pytest.raises(ConfigError, match="VIS_PERIOD: Detectron2 draws with OpenCV"):
            tiny_cfg("rcnn", tmp_path, VIS_PERIOD=1)
    monkeypatch.setattr("d2distill.detection.config.find_spec", lambda name: True)

    def picture(self, inputs, proposals):
        get_event_storage().put_image("proposals", torch.zeros(3, 8, 8, dtype=torch.uint8))

    monkeypatch.setattr(GeneralizedRCNN, "visualize_training", picture)
    run(tiny_cfg("rcnn", tmp_path, **SHORT, VIS_PERIOD=1, LOG_PERIOD=1))
    (events,) = tmp_path.glob("events.*")
    assert events.read_bytes().count(b"proposals") == 2


def test_a_schedule_made_for_another_number_of_processes_is_scaled(tiny, tmp_path):
    scaled = {**SHORT, "SOLVER.IMS_PER_BATCH": 4, "SOLVER.REFERENCE_WORLD_SIZE": 2, "SOLVER.STEPS": (0.5,)}
    run(tiny_cfg("rcnn", tmp_path, **scaled))
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())["SOLVER"]
    assert settings["IMS_PER_BATCH"] == 2 and settings["MAX_ITER"] == 4 and settings["STEPS"] == [0.5]
    assert "Scaled to 1 processes: SOLVER.MAX_ITER was 2, now 4; " in (tmp_path / "log.txt").read_text()


def test_steps_in_shares_of_the_run(tiny, tmp_path):
    """They stay shares in the settings that are kept, so that they are of a resumed run's MAX_ITER, too."""
    for end in (4, 8):
        shares = {"SOLVER.STEPS": (0.5, 0.75), "SOLVER.MAX_ITER": end, "SOLVER.WARMUP_ITERS": 0, "SOLVER.BASE_LR": 1.0}
        cfg = tiny_cfg("rcnn", tmp_path, **shares, **{"DISTILL.METHODS": []})
        register_datasets(cfg)
        trainer = build_trainer(cfg, load_training_set(cfg))
        rates = []
        for _ in range(end):
            rates.append(trainer.optimizer.param_groups[0]["lr"])
            trainer.optimizer.step()
            trainer.task.lr_scheduler.step()
        assert rates == pytest.approx([*[1.0] * (end // 2), *[0.1] * (end // 4), *[0.01] * (end // 4)])
        assert trainer.settings["SOLVER.STEPS"] == [0.5, 0.75] and trainer.settings["SOLVER.MAX_ITER"] == end


def test_an_evaluator_that_is_not_known(tiny, tmp_path):
    cfg = tiny_cfg("rcnn", tmp_path, **SHORT)
    run(cfg)
    vars(MetadataCatalog.get("tiny_val"))["evaluator_type"] = "panoptic"
    try:
        with pytest.raises(ConfigError, match="tiny_val asks for the evaluator 'panoptic'; known: coco"):
            run(cfg, resume=True)
    finally:
        vars(MetadataCatalog.get("tiny_val"))["evaluator_type"] = "coco"


@pytest.mark.parametrize("zoo", [False, True])
def test_a_merged_file_gives_student_and_teacher(tmp_path, zoo):
    """Before what the zoo's configuration brings, but not before weights that were asked for."""
    model = build(small_cfg(), seed=3)
    teacher = {f"teacher.{key}": value for key, value in model.teacher.state_dict().items()}
    student = {key: value for key, value in model.state_dict().items() if not key.startswith("distillers.")}
    torch.save({"model": {**student, **teacher}}, tmp_path / "merged.pth")
    torch.save({"model": {**model.teacher.state_dict()}}, tmp_path / "teacher.pth")
    if zoo:
        opts = {**SMALL, **TEACHER}
        del opts["TEACHER.MODEL.WEIGHTS"]
        opts["MODEL.WEIGHTS"] = str(tmp_path / "merged.pth")
        cfg = load_cfg("configs/det/review_dkd_r101_r18.yaml", [item for pair in opts.items() for item in pair])
        assert cfg.TEACHER.MODEL.WEIGHTS.startswith("https://")
    else:
        cfg = small_cfg(**{"MODEL.WEIGHTS": str(tmp_path / "merged.pth")})
    built = build(cfg, seed=4)
    assert built.teacher_adapter.key == "MODEL.WEIGHTS"
    assert_identical({**built.teacher.state_dict()}, {**model.teacher.state_dict()})
    cfg.TEACHER.MODEL.WEIGHTS = str(tmp_path / "teacher.pth")
    assert build(cfg).teacher_adapter.key == "TEACHER.MODEL.WEIGHTS"
