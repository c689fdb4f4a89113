"""Predictions of pictures: which files are taken, and what is written of them."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from d2distill.classification.deployed import ExportedClassifier
from d2distill.common.errors import DataError
from d2distill.detection.deployed import ExportedDetector
from d2distill.tools.predict import find_pictures
from d2distill.tools.predict import main as predict

CLASSES = ["cat", "dog", "owl"]
PREPROCESS = {"mean": [0.0] * 3, "std": [1.0] * 3, "size": 8, "resize": 8, "interpolation": "bilinear"}


def gray(path, value, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)
    return path


@pytest.fixture
def model(monkeypatch):
    """Puts a model in the place of the one to load."""
    monkeypatch.setattr("d2distill.deployed.student_file", lambda path: path)
    return lambda network: monkeypatch.setattr("d2distill.deployed.load", lambda path, device: network)


@pytest.fixture
def classifier(model):
    """Logits (v, 0, 1) of images whose pixels are v / 10; several classes for each with `multi_label`."""

    def build(**description):
        def program(images):
            value = images.mean((1, 2, 3)) / 10
            return [torch.stack([value, torch.zeros_like(value), torch.ones_like(value)], dim=1)]

        facts = {"task": "classification", "classes": CLASSES, "preprocess": PREPROCESS, **description}
        model(ExportedClassifier(program, facts))

    return build


def test_which_files_are_taken(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "in/b.png",
        "in/deep/a.JPG",
        "in/c.webp",
        "in/.hidden/d.png",
        "in/._e.png",
        "in/out/f.png",
        "g.png",
        "in/pictures/h.png",
    ):
        gray(tmp_path / name, 0)
    (tmp_path / "in/notes.txt").write_text("no picture")
    found = find_pictures(["g.png", "in", "in/*.png", "i*/**/*.JPG"], tmp_path / "in/out")
    assert [str(path) for path in found] == [
        "g.png", "in/b.png", "in/c.webp", "in/deep/a.JPG", "in/pictures/h.png",
    ]  # fmt: skip
    assert "by their ending: hidden (1), .txt (1)" in capsys.readouterr().err
    assert "in/pictures/h.png" not in map(str, find_pictures(["in"], tmp_path / "in"))
    with pytest.raises(DataError, match=r"^x\*\.png: no such picture"):
        find_pictures(["x*.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in empty"):
        find_pictures(["empty"])


def test_names_of_any_bytes(classifier, command, tmp_path):
    names = ["a\n\x1b[2J", "caf\udce9"]
    classifier(classes=[*names, "owl"])
    gray(tmp_path / "in" / f"{names[0]}.png", 30)
    (tmp_path / "in" / f"{names[1]}.png").write_bytes(b"broken")
    code, printed, errors = command(predict, "model", tmp_path / "in", "--output", tmp_path / "out")
    assert code == 1 and rf"{tmp_path}/in/a\n\x1b[2J.png" in printed and r"a\n\x1b[2J 84.4%, " in printed
    assert errors.count("\n") == 1 and r"in/caf\udce9.png" in errors and "\x1b" not in printed + errors
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [record["file"] for record in written] == [f"{tmp_path}/in/{name}.png" for name in names]
    assert r"caf\udce9" in (tmp_path / "out" / "predictions.csv").read_text()


def test_classes_with_probabilities(classifier, command, tmp_path):
    classifier()
    gray(tmp_path / "in/a.png", 30)
    (tmp_path / "in/b.png").write_bytes(b"broken")
    gray(tmp_path / "in/c/d.png", 0, size=(40, 20))
    out = tmp_path / "out"
    arguments = (tmp_path / "in", "--output", out, "--top", 2, "--batch-size", 2, "--draw")
    code, printed, errors = command(predict, "model", *arguments)
    assert code == 1 and "2 of 3 pictures" in printed and "owl 57.6%, cat 21.2%" in printed
    assert errors.count("\n") == 1 and f"cannot read image {tmp_path}/in/b.png" in errors
    first, second, third = json.loads((out / "predictions.json").read_text())
    expected = torch.tensor([3.0, 0, 1]).softmax(0)
    assert [entry["class"] for entry in first["classes"]] == ["cat", "owl"]
    assert [entry["probability"] for entry in first["classes"]] == pytest.approx(
        [expected[0].item(), expected[2].item()]
    )
    assert "cannot read image" in second["error"] and third["file"] == str(tmp_path / "in/c/d.png")
    with open(out / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"][-5:], row["rank"], row["class"]) for row in rows] == [
        ("a.png", "1", "cat"), ("a.png", "2", "owl"), ("d.png", "1", "owl"), ("d.png", "2", "cat"),
    ]  # fmt: skip
    drawn = {str(path.relative_to(out)) for path in out.rglob("*.png")}
    assert drawn == {"pictures/a.png.png", "pictures/c/d.png.png"}
    with Image.open(out / "pictures/c/d.png.png") as picture:
        assert picture.size == (640, 320)


def test_a_picture_with_several_classes(classifier, command, tmp_path):
    classifier(multi_label=True)
    files = [gray(tmp_path / "a.png", 20), gray(tmp_path / "b.png", 0)]
    code, _, _ = command(predict, "model", *files, "--output", tmp_path, "--top", 1, "--threshold", 0.6)
    first, second = json.loads((tmp_path / "predictions.json").read_text())
    # The sigmoids of 2 and 1; of 0 it is below the threshold.
    probabilities = [(entry["class"], round(entry["probability"], 4)) for entry in first["classes"]]
    assert code == 0 and probabilities == [("cat", 0.8808), ("owl", 0.7311)]
    assert [entry["class"] for entry in second["classes"]] == ["owl"]


def test_boxes_are_in_pixels_of_the_stored_picture(model, command, tmp_path):
    """A picture of 40 x 20 is given as 16 x 8: boxes grow by 2.5. EXIF turns one of 20 x 40 into it."""

    def program(image):
        assert image.shape == (3, 8, 16) and image[0, 4, 4] == 200
        boxes = torch.tensor([[4.0, 2, 8, 6], [0.0, 0, 16, 8]])
        return boxes, torch.tensor([0.9, 0.3]), torch.tensor([1, 2])

    config = "VERSION: 2\nINPUT: {MIN_SIZE_TEST: 8, MAX_SIZE_TEST: 16, FORMAT: BGR}"
    model(ExportedDetector(program, {"task": "detection", "classes": CLASSES, "config": config}))
    gray(tmp_path / "a.png", 200, size=(40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 40), (200,) * 3).save(tmp_path / "b.jpg", exif=exif)
    code, printed, _ = command(predict, "model", tmp_path, "--output", tmp_path / "out")
    assert code == 0 and printed.count("dog (1)") == 2
    records = json.loads((tmp_path / "out/predictions.json").read_text())
    (box,) = records[0]["boxes"]
    assert box == {"class": "dog", "score": pytest.approx(0.9), "box": pytest.approx([10.0, 5.0, 20.0, 15.0])}
    assert records[1]["boxes"] == records[0]["boxes"] and records[1]["width"] == 40
    lines = (tmp_path / "out/predictions.csv").read_text().splitlines()
    assert lines[1].endswith("a.png,dog,0.900000,10.00,5.00,20.00,15.00") and len(lines) == 3
    for name in ("a.png", "b.jpg"):
        with Image.open(tmp_path / f"out/pictures/{name}.png") as picture:
            drawn = np.asarray(picture.convert("RGB")).astype(int)
        assert drawn.shape == (320, 640, 3)
        # The left side of the box is drawn in a color, its inside is not.
        assert np.ptp(drawn[200, 158:162], axis=1).max() > 50 > np.ptp(drawn[200, 240])


def test_a_model_that_is_none(command, tmp_path):
    gray(tmp_path / "a.png", 0)
    (tmp_path / "damaged.onnx").write_bytes(b"damaged")
    for name, reason in (("none.pt2", "there is no file"), ("damaged.onnx", "cannot be opened")):
        code, _, errors = command(predict, tmp_path / name, tmp_path / "a.png")
        assert code == 2 and reason in errors and errors.count("\n") == 1


def test_help_needs_no_torch():
    code = (
        "import sys; from d2distill.tools import export, predict\n"
        "sys.argv[1:] = ['--help']\n"
        "for main in (export.main, predict.main):\n"
        "    try: main()\n"
        "    except SystemExit as end: assert end.code == 0 and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("usage:") == 2, done.stderr
