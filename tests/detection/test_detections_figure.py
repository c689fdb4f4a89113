"""Detections of teacher and student beside the ground truth."""

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from d2distill.common.engine.checkpoint import save_student
from d2distill.common.errors import ConfigError, DataError
from d2distill.deployed import load
from d2distill.detection.data import register_datasets
from d2distill.detection.deployed import describe_student
from d2distill.detection.teacher import build_teacher
from d2distill.tools.visualizations.boxes import found_boxes
from d2distill.tools.visualizations.detections import detections_figure
from tests.detection.tiny_detectors import build, plain
from tests.detection.tiny_training import tiny_cfg


@pytest.fixture
def run(tmp_path, tiny):
    """The folder of a run whose student has learned nothing."""
    cfg = tiny_cfg("rcnn", tmp_path / "narrow_seed1")
    register_datasets(cfg)
    DatasetCatalog.get("tiny_train")  # its classes are known then
    (tmp_path / "narrow_seed1").mkdir()
    (tmp_path / "narrow_seed1" / "config.yaml").write_text(cfg.dump())
    save_student(tmp_path / "narrow_seed1" / "student_best.pth", build(plain(cfg)).state_dict(), describe_student(cfg))
    return tmp_path / "narrow_seed1"


def boxes(axes):
    return [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches]


def test_ground_truth_teacher_and_student(run):
    figure = detections_figure([run], samples=2, threshold=0.0)
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert titles == ["ground truth", "teacher faster_rcnn_R_101_FPN_3x", "narrow, DKD + ReviewKD"]
    assert "tiny_val, scores of 0% or more" in figure.get_suptitle()
    student, cfg = load(run), tiny_cfg("rcnn", run)
    teacher = build_teacher(cfg)
    teacher.load_weights()
    records = DatasetCatalog.get("tiny_val")[:2]
    for record, row in zip(records, (figure.axes[:3], figure.axes[3:]), strict=True):
        assert boxes(row[0]) == [tuple(annotation["bbox"]) for annotation in record["annotations"]]
        inputs = student.preprocess(record["file_name"])
        with torch.no_grad():
            results = teacher.detect([inputs])[0], student([inputs])[0]
        for axes, result in zip(row[1:], results, strict=True):
            found = result["instances"].pred_boxes.tensor.flip(0)
            found[:, 2:] -= found[:, :2]
            assert len(found) and torch.allclose(torch.tensor(boxes(axes)), found, atol=1e-3)


def test_a_teacher_of_other_classes_has_numbers(run):
    heads = ["TEACHER.MODEL.ROI_HEADS.NUM_CLASSES", "3", "TEACHER.MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    cfg = tiny_cfg("rcnn", run, TEACHER__MODEL__ROI_HEADS__NUM_CLASSES=3)
    teacher = build_teacher(cfg)
    torch.save({"model": teacher.network.state_dict()}, run / "three.pth")
    figure = detections_figure(
        [run], opts=[*heads, "TEACHER.MODEL.WEIGHTS", str(run / "three.pth")], samples=1, threshold=0.0
    )
    kinds = {text.get_text().split(" ")[0] for text in figure.axes[1].texts}
    assert kinds and kinds <= {"0", "1", "2"}


def test_given_pictures_and_a_given_teacher(run):
    file = DatasetCatalog.get("tiny_val")[3]["file_name"]
    figure = detections_figure([run / "student_best.pth"], teacher=run, pictures=[file], threshold=1.0)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["teacher narrow, DKD + ReviewKD", "narrow, DKD + ReviewKD"]
    assert not any(map(boxes, figure.axes)) and "given pictures" in figure.get_suptitle()


def test_what_cannot_be_drawn(run, tmp_path, monkeypatch):
    (run / "student_best.pth").rename(tmp_path / "student_best.pth")
    with pytest.raises(ConfigError, match=r"no config\.yaml beside the weights"):
        detections_figure([tmp_path / "student_best.pth"])

    class Other:
        description = {"task": "classification"}

    monkeypatch.setattr("d2distill.tools.visualizations.detections.load", lambda path, device: Other())
    with pytest.raises(DataError, match="is a classifier: detections is for detectors"):
        detections_figure([run])


def test_the_surest_box_is_on_top():
    found = Instances((9, 9), pred_boxes=Boxes(torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5], [2, 2, 3, 3]])))
    found.scores, found.pred_classes = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([1, 0, 1])
    assert found_boxes(found, ["a", "b"], 0.5) == [([1, 1, 5, 5], 0, "a 50%"), ([0, 0, 4, 4], 1, "b 90%")]
