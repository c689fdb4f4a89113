"""A student detector that is used: described in its file, loaded in one line, by stock Detectron2 too."""

import json

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import GeneralizedRCNN, RetinaNet, build_model
from PIL import Image

import d2distill
from d2distill.common.errors import DataError
from d2distill.detection.data import load_training_set, register_datasets
from d2distill.detection.trainer import build_trainer
from d2distill.detection.weights import load_student
from tests.detection.tiny_training import TINY, tiny_cfg


@pytest.mark.parametrize(("name", "kind"), [("rcnn", GeneralizedRCNN), ("retinanet", RetinaNet)])
def test_a_student_is_loaded_in_one_line(tiny, tmp_path, name, kind, monkeypatch):
    cfg = tiny_cfg(name, tmp_path, MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0, MODEL__RETINANET__SCORE_THRESH_TEST=0.0)
    register_datasets(cfg)
    trainer = build_trainer(cfg, load_training_set(cfg))
    trainer.save_student("final")
    monkeypatch.chdir(tmp_path)
    student = d2distill.load(".")
    assert type(student.network) is kind and student.classes == [str(digit) for digit in range(10)]
    (picture, *_) = sorted((tiny / TINY["val"]["IMAGES"]).glob("*"))
    image = student.preprocess(picture)
    with Image.open(picture) as opened:
        assert (image["width"], image["height"]) == opened.size and min(image["image"].shape[1:]) == 96
        assert torch.equal(image["image"], student.preprocess(opened)["image"])
    (found,) = student([image])
    (expected,) = trainer.task.deployed_student().eval()([image])
    assert len(found["instances"]) == len(expected["instances"]) > 0
    assert torch.equal(found["instances"].scores, expected["instances"].scores)
    with pytest.raises(DataError, match="cannot read image"):
        student.preprocess(tmp_path / "student.json")


def test_stock_detectron2_builds_and_loads_it(tiny, tmp_path):
    cfg = tiny_cfg("rcnn", tmp_path)
    register_datasets(cfg)
    trainer = build_trainer(cfg, load_training_set(cfg))
    trainer.save_student("final")
    described = json.loads((tmp_path / "student.json").read_text())
    assert {len(made["sha256"]) for made in described["made_from"].values()} == {64}
    assert set(described["made_from"]) == {"TEACHER.MODEL.WEIGHTS", "tiny_train", "tiny_val"}
    (tmp_path / "stock.yaml").write_text(described["config"])
    stock = get_cfg()
    stock.merge_from_file(str(tmp_path / "stock.yaml"))
    assert yaml.safe_load(described["config"])["MODEL"]["META_ARCHITECTURE"] == "GeneralizedRCNN"
    model = build_model(stock)
    DetectionCheckpointer(model).load(str(tmp_path / "student_final.pth"))
    own = trainer.task.deployed_student().state_dict()
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())


def test_a_students_own_images_are_compared(tiny, tmp_path, log):
    """Its file says with which it was trained; another order of channels would go unseen."""
    cfg = tiny_cfg("rcnn", tmp_path)
    register_datasets(cfg)
    trainer = build_trainer(cfg, load_training_set(cfg))
    trainer.save_student("final")
    log.clear()
    student = str(tmp_path / "student_final.pth")
    load_student(trainer.task.model, student)
    assert "was trained with other settings" not in log.text
    trainer.task.model.input_format = "BGR" if cfg.INPUT.FORMAT == "RGB" else "RGB"
    load_student(trainer.task.model, student)
    assert f"was trained with other settings: set ['INPUT.FORMAT {cfg.INPUT.FORMAT}']" in log.text
