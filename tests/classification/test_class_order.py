"""A file of weights knows its classes: they are held against those of the data, and training against test images."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from d2distill.classification.config import get_cfg
from d2distill.classification.data.datasets import DATASET_REGISTRY, ArrayDataset, dataset_info, register_dataset
from d2distill.classification.inputs import resolve_inputs
from d2distill.classification.models import build_model
from d2distill.classification.trainer import evaluate, load_datasets
from d2distill.common.errors import CheckpointError, DataError
from tests.dataset_files import write_image_folder

DIGITS = [str(digit) for digit in range(10)]
SWAPPED = ["1", "0", *DIGITS[2:]]


def weights_of(folder, classes, kind="student"):
    state = build_model("resnet8", len(classes)).state_dict()
    facts = (
        {"d2distill": json.dumps({"classes": classes})} if kind == "student" else {"run_identity": {"classes": classes}}
    )
    torch.save({"model": state, **facts}, folder / "weights.pth")
    return str(folder / "weights.pth")


def make_cfg(*opts):
    cfg = get_cfg()
    settings = ["MODEL.DEVICE", "cpu", "MODEL.STUDENT.NAME", "resnet8", "DATASETS.NAME", "digits"]
    cfg.merge_from_list([*settings, "DATALOADER.NUM_WORKERS", 0, *opts])
    return cfg


@pytest.mark.parametrize("kind", ["student", "checkpoint"])
def test_evaluation_on_another_order_is_refused(tmp_path, kind):
    source = weights_of(tmp_path, SWAPPED, kind)
    message = r"10 classes, the data set has 10: number 0 is '1' there and '0' here\. DATASETS\.CLASSES names the"
    with pytest.raises(CheckpointError, match=rf"^MODEL\.STUDENT\.WEIGHTS: {source} was trained on {message}"):
        evaluate(make_cfg("MODEL.STUDENT.WEIGHTS", source))


def test_test_images_of_some_of_the_classes(tmp_path):
    """Evaluated alone they would have the labels of other classes; the error says which setting is right."""
    write_image_folder(tmp_path, classes=2, per_class=0)
    (tmp_path / "val" / "class_0000").rename(tmp_path / "val" / "class_0002")
    source = weights_of(tmp_path, [f"class_{n:04d}" for n in range(3)])
    folder = ("DATASETS.NAME", "folder", "DATASETS.ROOT", tmp_path, "INPUT.SIZE", 32)
    cfg = make_cfg("MODEL.STUDENT.WEIGHTS", source, *map(str, folder))
    with pytest.raises(CheckpointError, match=r"3 classes, the data set has 2: number 0 .*\. DATASETS\.CLASSES names"):
        evaluate(cfg)
    (tmp_path / "student.json").write_text(json.dumps({"classes": [f"class_{n:04d}" for n in range(3)]}))
    cfg.DATASETS.CLASSES = str(tmp_path / "student.json")
    assert "top1" in evaluate(cfg)


@pytest.mark.parametrize("methods", [["KD"], ["SimKD"], ["RKD"]])
def test_a_teacher_of_another_order(tmp_path, methods):
    """Its logits would teach the wrong class; its features teach the same."""
    source = weights_of(tmp_path, SWAPPED)
    cfg = make_cfg("DISTILL.METHODS", methods, "MODEL.TEACHER.NAME", "resnet8", "MODEL.TEACHER.WEIGHTS", source)
    if methods == ["RKD"]:
        resolve_inputs(cfg, DIGITS)
        return
    with pytest.raises(CheckpointError, match=rf"^MODEL\.TEACHER\.WEIGHTS: {re.escape(source)} was trained on 10 "):
        resolve_inputs(cfg, DIGITS)


def test_a_student_that_begins_with_another_order(tmp_path, log):
    cfg = make_cfg("MODEL.STUDENT.WEIGHTS", weights_of(tmp_path, SWAPPED))
    resolve_inputs(cfg, DIGITS)
    assert "number 0 is '1' there and '0' here; right only if the order may be another" in log.text


def test_training_and_test_images_of_other_classes(monkeypatch):
    def build(info, root, split):
        classes = ["cat", "dog"] if split == "train" else ["dog", "cat"]
        return ArrayDataset(info, np.zeros((2, 3, 32, 32), np.uint8), [0, 1], classes)

    monkeypatch.setattr(DATASET_REGISTRY, "_obj_map", dict(DATASET_REGISTRY._obj_map))
    register_dataset(replace(dataset_info("digits"), name="pets", num_classes=2))(build)
    with pytest.raises(DataError, match=r"pets have other classes than .*: dog, cat there, cat, dog here"):
        load_datasets(make_cfg("DATASETS.NAME", "pets"))
