"""tools/list.py: what is listed is there, and true."""

import json
import re
from pathlib import Path

import yaml

from d2distill.common.distillers import DISTILLERS
from d2distill.tools import list as tool

ROOT = Path(__file__).resolve().parents[2]


def rows(command, *arguments):
    code, out, _ = command(tool.main, *arguments, "--json")
    assert code == 0
    return json.loads(out)


def test_methods(command):
    found = {row["method"]: row for row in rows(command, "methods")}
    assert sorted(found) == sorted(name for name, _ in DISTILLERS)
    assert found["DKD"] == {
        "method": "DKD", "looks at": "logits", "notes": "no mixed images",
        "tasks": "classification, detection (R-CNN)", "adds": "-", "published": "76.32", "digits": "94.93 ± 0.50",
        "paper": "Decoupled Knowledge Distillation, CVPR 2022",
    }  # fmt: skip
    # Two memories of 128 values for each image, by far the most.
    assert 2 * 50_000 * 128 < 1e6 * float(found["CRD"]["adds"].removesuffix(" M")) < 1.02 * 2 * 50_000 * 128
    assert found["FitNet"]["adds"] == "0.02 M"  # a 1x1 convolution of 128 channels each
    assert found["USKD"]["notes"] == "no teacher, no mixed images" and found["USKD"]["tasks"] == "classification"
    assert found["PKD"]["tasks"] == "classification, detection (R-CNN, RetinaNet)"
    assert all(re.search(r", (.*20\d\d|arXiv:\d{4}\.\d+)$", row["paper"]) for row in found.values()), found


def test_detectors_are_those_of_the_page():
    """tests/test_docs.py holds its table by building detectors."""
    page = (ROOT / "docs" / "detection.md").read_text()
    refused = re.findall(r"`(\w+)`", re.search(r"\| not in detectors \|(.*)", page)[1])
    softmax = re.findall(r"`(\w+)`", re.search(r"\| class logits, a softmax \|(.*)", page)[1])
    for row in tool.methods():
        kinds = " (R-CNN)" if row["method"] in softmax else " (R-CNN, RetinaNet)"
        assert row["tasks"] == "classification" + f", detection{kinds}" * (row["method"] not in refused)


def test_models_configs_and_data_sets(command):
    found = {(row["family"], row["model"]): row for row in rows(command, "models")}
    assert found["imagenet", "ResNet18"]["parameters"] == "11.690 M" and ("any", "timm:NAME") in found
    found = {row["config"]: row for row in rows(command, "configs")}
    assert len(found) == len([path for path in ROOT.glob("configs/*/*.yaml") if not path.stem.startswith("base_")])
    assert found["cls/cifar100_vgg13_mv2_dkd.yaml"] == {
        "config": "cls/cifar100_vgg13_mv2_dkd.yaml", "methods": "DKD", "optimizer": "SGD",
        "pair": "vgg13 -> MobileNetV2", "published": "69.71",
        "comment": "CIFAR-100 as in the literature since CRD: 240 epochs of SGD, batch 64.",
    }  # fmt: skip
    assert found["det/review_dkd_r50_mv2.yaml"]["pair"] == "faster_rcnn_R_50_FPN_3x -> MobileNetV2"
    stems = {Path(name).stem for name in found}
    assert yaml.safe_load((ROOT / "tools" / "published.yaml").read_text()).keys() <= stems
    found = {row["data set"]: row for row in rows(command, "datasets")}
    assert found["tiny_imagenet"]["classes"] == "200" and found["folder"]["classes"] == "yours"
    assert found["digits_coco_train"]["classes"] == "10" and found["coco_2017_val"]["classes"] == "80"


def test_filter_and_text(command):
    code, out, _ = command(tool.main, "configs", "--filter", "no such text")
    assert code == 1 and not out
    code, out, _ = command(tool.main, "configs", "--filter", "SHUFFLEV2")
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("config ") and len(lines) > 5
    assert all("shuffle" in line.lower() for line in lines[1:]) and len({line.index("  ") > 0 for line in lines}) == 1
    assert command(tool.main, "nothing")[0] == 2
