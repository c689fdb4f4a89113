"""Exported detectors: TorchScript and ONNX find what the student finds, in images of any size."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import d2distill
from d2distill.common.engine.run_folder import write_run_folder
from d2distill.common.errors import CheckpointError
from d2distill.detection.data import load_training_set, register_datasets
from d2distill.detection.trainer import build_trainer
from d2distill.tools.export import main as export
from d2distill.tools.export_detection import _difference
from d2distill.tools.predict import main as predict
from tests.detection.tiny_training import TINY, tiny_cfg

#: Scores that an untrained detector reaches in some pictures and not in others.
THRESHOLDS = {"MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.091, "MODEL__RETINANET__SCORE_THRESH_TEST": 0.1}
#: Wide enough for that.
RESNET18 = {
    "MODEL__RESNETS__DEPTH": 18, "MODEL__RESNETS__STEM_OUT_CHANNELS": 64, "MODEL__RESNETS__RES2_OUT_CHANNELS": 64
}  # fmt: skip


def save(name, folder):
    """A run folder without a training."""
    cfg = tiny_cfg(name, folder, TEST__TEACHER=False, **RESNET18, **THRESHOLDS)
    register_datasets(cfg)
    trainer = build_trainer(cfg, load_training_set(cfg))
    folder.mkdir()
    write_run_folder(cfg)
    trainer.save_student("final")


def found(model, pictures):
    results = [model([model.preprocess(picture)])[0]["instances"] for picture in pictures]
    return [(x.pred_boxes.tensor, x.scores, x.pred_classes) for x in results]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rcnn", "retinanet"])
def test_every_file_finds_what_the_student_finds(tiny, tmp_path, command, monkeypatch, name):
    monkeypatch.setattr("d2distill.tools.export_detection.median_ms", lambda run, device: (run(), 7.0)[1])
    save(name, tmp_path / "run")
    code, printed, errors = command(export, tmp_path / "run")
    assert code == 0 and "checked on the test images of tiny_val" in printed, errors
    (path, *_) = sorted((tiny / TINY["val"]["IMAGES"]).glob("*"))
    picture = Image.open(path).convert("RGB")
    # Other shapes than the one that was traced, and one without anything in it.
    pictures = [picture, picture.rotate(90, expand=True), picture.crop((0, 0, 60, 140)), Image.new("RGB", (200, 90))]
    student = d2distill.load(tmp_path / "run")
    expected = found(student, pictures)
    assert len({len(scores) for _, scores, _ in expected}) > 1 and sum(len(scores) for _, scores, _ in expected) > 4
    for file in ("student.safetensors", "student.ts", "student.onnx"):
        model = d2distill.load(tmp_path / "run/export" / file)
        assert model.classes == student.classes
        order = f"image: {student.description['preprocess']['format']}, float32 in 0..255"
        assert (order in model.description.get("input", "")) == (file != "student.safetensors")
        for own, other in zip(expected, found(model, pictures), strict=True):
            # By score: equal ones may come in another order.
            assert torch.equal(own[2].sort().values, other[2].sort().values)
            torch.testing.assert_close(own[1], other[1], rtol=1e-3, atol=1e-4)
        content = bytearray((tmp_path / "run/export" / file).read_bytes())
        content[len(content) // 2] ^= 4
        (tmp_path / file).write_bytes(content)
        with pytest.raises(CheckpointError, match="another SHA-256"):
            d2distill.load(tmp_path / file)
            torch.testing.assert_close(own[0].sort(0).values, other[0].sort(0).values, rtol=1e-3, atol=0.05)
    table = (tmp_path / "run/export/export.md").read_text()
    rows = [row.split("|") for row in table.splitlines()[2:7]]
    assert [row[1].strip() for row in rows][:3] == ["teacher", "student", "student.safetensors"]
    number = sum(len(scores) for _, scores, _ in found(student, sorted((tiny / TINY["val"]["IMAGES"]).glob("*"))))
    assert number > 0 and table.count(f"{number} of {number} boxes are found again among {number}") == 3
    card = ModelCard.load(tmp_path / "run/export/README.md")
    assert card.data.pipeline_tag == "object-detection" and card.data.eval_results[0].metric_type == "bbox/AP"

    # Alone, in an empty folder.
    file = {"rcnn": "student.ts", "retinanet": "student.onnx"}[name]
    (tmp_path / "empty").mkdir()
    shutil.move(tmp_path / "run/export" / file, tmp_path / "empty" / file)
    monkeypatch.chdir(tmp_path / "empty")
    code, _, errors = command(predict, file, path, "--threshold", 0)
    assert code == 0, errors
    (record,) = json.loads((tmp_path / "empty/predictions/predictions.json").read_text())
    assert [entry["score"] for entry in record["boxes"]] == pytest.approx(expected[0][1].tolist(), abs=1e-4)
    assert {entry["class"] for entry in record["boxes"]} == {student.classes[i] for i in expected[0][2]}
    assert (tmp_path / f"empty/predictions/pictures/{path.name}.png").is_file()


def test_the_difference_is_of_boxes_that_belong_together():
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 70], [20, 20, 30, 30]])
    scores, classes = torch.tensor([0.9, 0.5, 0.5]), torch.tensor([1, 2, 3])
    order = torch.tensor([0, 2, 1])
    moved = boxes + torch.tensor([0.25, 0, 0, 0])
    nothing = boxes[:0], scores[:0], classes[:0]
    same = _difference([(boxes, scores, classes)], [(moved[order], scores[order] - 0.125, classes[order])])
    assert same == "0.25 pixels and 0.12 in a score; 3 of 3 boxes are found again among 3"
    other = [(boxes, scores, torch.tensor([1, 2, 4])), nothing]
    missed = _difference([(boxes, scores, classes), (boxes, scores, classes)], other)
    assert missed == "0 pixels and 0 in a score; 2 of 6 boxes are found again among 3"
    assert _difference([nothing], [nothing]).startswith("0 pixels and 0 in a score; 0 of 0")
