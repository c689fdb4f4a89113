"""docs/own_data.md, as it stands: from weights of 1000 classes, or of COCO, to a student that ships and is right."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from detectron2.modeling import build_model
from PIL import Image

from d2distill.detection.config import load_cfg

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "own_data.md").read_text()
COMMANDS = [line for block in re.findall(r"```\n(d2distill-.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
ENTRY_POINTS = dict(re.findall(r'"(d2distill-[\w-]+) = ([\w.:]+)"', (ROOT / "setup.py").read_text()))
FRUIT = {
    "apple": (200, 30, 40), "banana": (230, 210, 60), "fig": (90, 40, 110), "kiwi": (80, 150, 50),
    "orange": (240, 140, 20), "plum": (40, 50, 140),
}  # fmt: skip


def run(command, line, *settings):
    name, *arguments = shlex.split(line)
    module, _, function = ENTRY_POINTS[name].partition(":")
    code, out, error = command(getattr(import_module(module), function), *arguments, *settings)
    assert code == 0, f"{line}: {error}"
    return out


def predictions(path):
    with open(path / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def in_fresh_process(command_line, cwd):
    """A command of the page, where nothing of the training is imported."""
    name, *arguments = shlex.split(command_line)
    module, _, function = ENTRY_POINTS[name].partition(":")
    code = f"import sys; sys.argv[1:] = {arguments!r}; from {module} import {function}; {function}()"
    subprocess.run([sys.executable, "-c", code], cwd=cwd, check=True, env=None)


# ---- pictures in folders

SMALL_RUN = {
    "MODEL.DEVICE": "cpu", "INPUT.SIZE": 32, "SOLVER.EPOCHS": 6, "SOLVER.IMS_PER_BATCH": 12, "DATALOADER.NUM_WORKERS": 0
}  # fmt: skip
NETWORKS = {
    "folder_teacher": {"MODEL.STUDENT.NAME": "timm:test_convnext2", "MODEL.STUDENT.WEIGHTS": "imagenet_convnext2.pth"},
    "folder_student": {"MODEL.STUDENT.NAME": "timm:test_convnext", "MODEL.STUDENT.WEIGHTS": "imagenet_convnext.pth"},
}
NETWORKS["folder_dkd"] = NETWORKS["folder_student"] | {"MODEL.TEACHER.NAME": "timm:test_convnext2"}


def write_fruit(folder):
    rng = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", 3)):
        for name, color in FRUIT.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = np.clip(np.array(color) + rng.normal(0, 25, (44, 36, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def test_pictures_in_folders(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    write_fruit(tmp_path / "photos")
    torch.manual_seed(0)
    for name in ("convnext2", "convnext"):  # as ImageNet's: 1000 classes
        torch.save({"state_dict": timm.create_model(f"test_{name}").state_dict()}, f"imagenet_{name}.pth")
    *others, last = [line for line in COMMANDS if "-det" not in line and "own" not in line and "found" not in line]
    assert len(others) == 6 and last.startswith("d2distill-predict shipped/student.onnx")
    for line in others:
        config = re.search(r"cls/(\w+)\.yaml", line)
        settings = SMALL_RUN | NETWORKS[config[1]] if config else {}
        out = run(command, line, *(part for pair in settings.items() for part in pair))
    log = (tmp_path / "output/folder_teacher/log.txt").read_text()
    assert re.search(r"1000 classes.* 6", log) and re.search("apple.*banana.*fig.*kiwi.*orange.*plum", log)
    results = json.loads((tmp_path / "output/folder_dkd/results.json").read_text())
    assert results["best_top1"] > 90 and results["teacher_top1"] > 90 and set(results["per_class"]) == set(FRUIT)
    found = predictions(tmp_path / "predictions")
    assert "student.onnx" in out and len({row["file"] for row in found}) == 18
    # A picture, the exported file, and nothing else.
    shutil.rmtree("output")
    shutil.rmtree("photos/train")
    in_fresh_process(last, tmp_path)
    again = predictions(tmp_path / "predictions")
    for rows in (found, again):
        assert np.mean([Path(row["file"]).parent.name == row["class"] for row in rows if row["rank"] == "1"]) > 0.9


# ---- boxes in COCO's format

SHAPES = {"ball": (200, 40, 40), "box": (40, 60, 200)}
SMALL_DETECTOR = {
    "MODEL.DEVICE": "cpu", "MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.WIDTH_PER_GROUP": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32, "MODEL.RESNETS.STEM_OUT_CHANNELS": 16, "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0, "MODEL.FPN.OUT_CHANNELS": 32, "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100, "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50, "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20, "INPUT.MIN_SIZE_TRAIN": "(96,)", "INPUT.MIN_SIZE_TEST": 96,
    "SOLVER.BASE_LR": 0.005, "SOLVER.WARMUP_ITERS": 10, "SOLVER.CLIP_GRADIENTS.ENABLED": True, "TEST.EVAL_PERIOD": 0,
    # The same for teacher and student, as the student begins with the teacher's weights.
    "INPUT.FORMAT": "RGB", "MODEL.PIXEL_MEAN": [120.0] * 3, "MODEL.PIXEL_STD": [60.0] * 3, "DATALOADER.NUM_WORKERS": 0,
}  # fmt: skip
STEPS = {
    "own_teacher": {"MODEL.WEIGHTS": "coco.pth", "SOLVER.MAX_ITER": 100},
    # From the weights of its teacher, which here is of the same shape: the test is no training from nothing.
    "own_student": {"MODEL.WEIGHTS": "output/own_teacher/student_best.pth", "SOLVER.MAX_ITER": 4},
}
STEPS["own_dkd"] = STEPS["own_student"] | {"TEACHER.CONFIG_FILE": "output/own_teacher/config.yaml"}


def write_shapes(folder):
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split, number in (("train", 16), ("val", 6)):
        images, annotations = [], []
        (folder / split).mkdir()
        for i in range(number):
            pixels = rng.normal(120, 10, (96, 96, 3))
            for k, color in enumerate(SHAPES.values()):
                # One in each half, in either order.
                x, y = 48 * ((i + k) % 2) + rng.integers(4, 12), rng.integers(34, 42)
                width, height = rng.integers(28, 36, 2)
                width, height = min(width, 96 - x), min(height, 96 - y)
                pixels[y : y + height, x : x + width] = np.array(color) + rng.normal(0, 10, (height, width, 3))
                box = [int(v) for v in (x, y, width, height)]
                annotations.append({
                    "id": len(annotations) + 1, "image_id": i, "category_id": 3 + 7 * k, "bbox": box,
                    "area": box[2] * box[3], "iscrowd": 0,
                })  # fmt: skip
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": 96, "height": 96})
        categories = [{"id": 3 + 7 * k, "name": name} for k, name in enumerate(SHAPES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))


def test_boxes_in_cocos_format(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    write_shapes(tmp_path / "datasets/own")
    shapes = [part for pair in SMALL_DETECTOR.items() for part in pair]
    coco = load_cfg(
        str(ROOT / "configs/det/own_teacher.yaml"), [*shapes, "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", 80]
    )
    torch.manual_seed(0)
    torch.save({"model": build_model(coco).state_dict()}, "coco.pth")
    *others, last = [line for line in COMMANDS if "own_" in line or "shipped_detector" in line]
    assert len(others) == 5 and last.startswith("d2distill-predict shipped_detector/student.onnx")
    for line in others:
        config = re.search(r"det/(\w+)\.yaml", line)
        settings = SMALL_DETECTOR | STEPS[config[1]] if config else {}
        run(command, line, *(part for pair in settings.items() for part in pair))
    results = json.loads((tmp_path / "output/own_dkd/results.json").read_text())
    assert results["bbox/AP50"] > 80 and results["teacher_bbox/AP50"] > 80 and set(results["per_class"]) == set(SHAPES)
    assert len(list((tmp_path / "found/pictures").rglob("*.png"))) == 6
    truth = json.loads((tmp_path / "datasets/own/annotations/val.json").read_text())["annotations"]
    shutil.rmtree("output")
    shutil.rmtree("datasets/own/annotations")
    in_fresh_process(last, tmp_path)
    for folder in ("found", "found_onnx"):
        rows = predictions(tmp_path / folder)
        for made in truth:
            x, y, width, height = made["bbox"]
            inside = [
                row["class"]
                for row in rows
                if Path(row["file"]).stem == str(made["image_id"])
                and x < (float(row["x0"]) + float(row["x1"])) / 2 < x + width
                and y < (float(row["y0"]) + float(row["y1"])) / 2 < y + height
            ]
            assert inside and set(inside) == {"ball" if made["category_id"] == 3 else "box"}
