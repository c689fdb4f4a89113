"""A detector's file knows its classes: they are held against those of the data that it is trained and evaluated on."""

import json

import pytest
import torch

from d2distill.common.errors import CheckpointError
from d2distill.detection.data import load_training_set
from d2distill.detection.trainer import build_trainer, evaluate
from tests.detection.tiny_detectors import build, plain
from tests.detection.tiny_training import TINY, tiny_cfg

DIGITS = [str(digit) for digit in range(10)]
SWAPPED = ["1", "0", *DIGITS[2:]]


def weights_of(cfg, folder, classes, kind="student"):
    facts = (
        {"d2distill": json.dumps({"classes": classes})} if kind == "student" else {"run_identity": {"classes": classes}}
    )
    torch.save({"model": build(plain(cfg)).state_dict(), **facts}, folder / "weights.pth")
    return str(folder / "weights.pth")


@pytest.mark.parametrize("kind", ["student", "checkpoint"])
def test_evaluation_on_another_order_is_refused(tiny, root, kind):
    """The same pictures, whose json numbers two classes the other way."""
    content = json.loads((tiny / TINY["val"]["JSON"]).read_text())
    for entry in content["categories"]:
        entry["id"] = {1: 2, 2: 1}.get(entry["id"], entry["id"])
    for entry in content["annotations"]:
        entry["category_id"] = {1: 2, 2: 1}.get(entry["category_id"], entry["category_id"])
    (root / "swapped.json").write_text(json.dumps(content))
    register = {"swapped": {"JSON": str(root / "swapped.json"), "IMAGES": str(tiny / TINY["val"]["IMAGES"])}}
    # Of the training set nothing is read, or known.
    names = {"DATASETS.TRAIN": ("swapped",), "DATASETS.TEST": ("swapped",)}
    cfg = tiny_cfg("rcnn", root, **{"DATASETS.REGISTER": register, **names})
    cfg.MODEL.WEIGHTS = weights_of(cfg, root, DIGITS, kind)
    message = r"10 classes, the data set swapped has 10: number 0 is '0' there and '1' here\. The data must list"
    with pytest.raises(CheckpointError, match=rf"^MODEL\.WEIGHTS: {cfg.MODEL.WEIGHTS} was trained on {message}"):
        evaluate(plain(cfg))


@pytest.mark.parametrize("methods", [["DKD"], ["ReviewKD"]])
def test_networks_that_begin_with_another_order(tiny, tmp_path, methods, log):
    """A teacher's logits would teach the wrong class, its features the same; a student may learn another order."""
    cfg = tiny_cfg("rcnn", tmp_path, **{"DISTILL.METHODS": methods})
    dicts = load_training_set(cfg)
    cfg.MODEL.WEIGHTS = weights_of(cfg, tmp_path, SWAPPED)
    trainer = build_trainer(cfg, dicts)
    assert "MODEL.WEIGHTS" in log.text and "number 0 is '1' there and '0' here; right only if the order may" in log.text
    assert trainer.task.run_identity["classes"] == DIGITS
    cfg.TEACHER.MODEL.WEIGHTS = weights_of(cfg, tmp_path, SWAPPED)
    if methods == ["ReviewKD"]:
        build_trainer(cfg, dicts)
        return
    with pytest.raises(CheckpointError, match=r"^TEACHER\.MODEL\.WEIGHTS: .* was trained on 10 classes.*'1' there"):
        build_trainer(cfg, dicts)
