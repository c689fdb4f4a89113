"""Exported classifiers: every file predicts as the student does, alone, and is described."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from torchvision.transforms.v2.functional import to_pil_image

import d2distill
from d2distill.classification.data import build_dataset
from d2distill.classification.evaluation import average_precision
from d2distill.classification.trainer import build_trainer, load_datasets
from d2distill.common.engine.run_folder import write_run_folder
from d2distill.common.errors import CheckpointError
from d2distill.tools.export import main as export
from d2distill.tools.export_classification import Export
from tests.classification.test_multilabel import cfg_of as multi_label_cfg
from tests.classification.test_multilabel import write_colors
from tests.classification.tiny_training import run, small_cfg
from tests.dataset_files import write_image_folder

ROOT = Path(__file__).resolve().parents[2]
FILES = ("student.safetensors", "student.pt2", "student.onnx", "student_int8.onnx")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Latency is measured once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d2distill.tools.export_classification.median_ms", lambda run, device: (run(), 7.0)[1])
        yield


def save(cfg):
    """A run folder without a training."""
    trainer = build_trainer(cfg, *load_datasets(cfg))
    Path(cfg.OUTPUT_DIR).mkdir()
    write_run_folder(cfg)
    trainer.save_student("final")
    return Path(cfg.OUTPUT_DIR)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return save(small_cfg(tmp_path_factory.mktemp("runs") / "teacher", DISTILL__METHODS=[]))


@pytest.fixture(scope="module")
def student(untrained):
    """A run on digits that distils from a teacher whose weights are there."""
    folder = untrained.parent
    short = {"SOLVER__EPOCHS": 3, "DATASETS__TRAIN_SIZE": 400, "TEST__TEACHER": False, "TEST__EVAL_PERIOD": 3}
    teacher = {"MODEL__TEACHER__NAME": "resnet8", "MODEL__TEACHER__WEIGHTS": str(untrained / "student_final.pth")}
    run(small_cfg(folder / "student", **short, **teacher, DISTILL__METHODS=["KD"], DISTILL__KD__WEIGHT=0.01))
    return folder / "student"


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    """A folder with every file of it, and what was printed."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["export", str(student), "--int8", "--output", str(folder)])
        export()
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def digits():
    """Test images and their labels."""
    images = build_dataset("digits", split="val")
    return [to_pil_image(images.load(index)[0]) for index in range(len(images))], images.labels


@torch.no_grad()
def predict(model, pictures):
    return model(torch.stack([model.preprocess(picture) for picture in pictures]))


@pytest.mark.slow
def test_every_file_predicts_as_the_student(student, exported, digits):
    folder, printed = exported
    assert "checked on 500 test images of digits" in printed and "500 of 500 pictures have the same class" in printed
    assert "calibrated on 256 training images" in printed
    eager, pictures = d2distill.load(student), digits[0][:64]
    logits = predict(eager, pictures)
    for name in FILES:
        model = d2distill.load(folder / name)
        found = predict(model, pictures)
        if "int8" not in name:
            torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
        assert found.argmax(1).eq(logits.argmax(1)).sum() >= 56
        torch.testing.assert_close(predict(model, pictures[:1]), found[:1], rtol=1e-4, atol=1e-4)
        assert model.classes == eager.classes and model.description["network"] == "resnet8"
        assert ("normalized inside" in model.description.get("input", "")) == (name != "student.safetensors")
    assert (folder / "student_int8.onnx").stat().st_size < 0.6 * (folder / "student.onnx").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_of_a_file_is_found(exported, tmp_path, name):
    content = bytearray((exported[0] / name).read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/{name} .*another SHA-256"):
        d2distill.load(tmp_path / name)


@pytest.mark.slow
def test_the_table_and_the_card_have_the_accuracies(student, exported, digits):
    folder, printed = exported
    results = json.loads((student / "results.json").read_text())
    table = (folder / "export.md").read_text()
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")] for row in table.splitlines()[2:8]}
    assert list(rows) == ["teacher resnet8", "student", *FILES]
    assert rows["student"][2] == "0.078 M" and rows["student"][5:7] == ["7.00 ms", "7.00 ms"]
    accuracies = {name: float(row[7]) for name, row in rows.items()}
    best = pytest.approx(results["best_top1"], abs=0.01)
    assert all(accuracies[name] == best for name in ("student", *FILES[:3]))
    assert accuracies["student_int8.onnx"] == pytest.approx(results["best_top1"], abs=5)
    found = predict(d2distill.load(student.parent / "teacher"), digits[0]).argmax(1)
    assert accuracies["teacher resnet8"] == pytest.approx(100 * found.eq(digits[1]).double().mean().item(), abs=0.01)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "d2distill" and card.data.pipeline_tag == "image-classification"
    assert card.data.eval_results[0].metric_value == best and card.data.eval_results[0].dataset_name == "digits"
    assert "trained on digits by KD from resnet8" in card.text and table.strip() in card.text
    assert table in printed
    assert '"source": "student_final.pth", "sha256"' in card.text and str(student.parent) not in card.text


@pytest.mark.slow
def test_a_file_predicts_alone(student, exported, digits, tmp_path):
    """In a fresh process, in an empty folder, without the run and without data sets."""
    shutil.copy(exported[0] / "student.onnx", tmp_path / "alone.onnx")
    eager, picture = d2distill.load(student), digits[0][5]
    picture.save(tmp_path / "five.png")
    expected = predict(eager, [picture])[0].softmax(0).tolist()
    command = [sys.executable, "-W", "ignore", ROOT / "tools/predict.py", "alone.onnx", "five.png", "--top", "10"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DETECTRON2_DATASETS": str(tmp_path / "none")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / "predictions/predictions.json").read_text())
    found = {entry["class"]: entry["probability"] for entry in record["classes"]}
    assert found == pytest.approx(dict(zip(eager.classes, expected, strict=True)), abs=1e-5)


@pytest.mark.slow
def test_without_the_test_images(command, tmp_path):
    """Then they are --images' pictures, else random; a teacher whose weights are gone is left out."""
    write_image_folder(tmp_path / "data")
    names = {"DATASETS__NAME": "folder", "DATASETS__ROOT": str(tmp_path / "data"), "INPUT__SIZE": 32}
    cfg = small_cfg(tmp_path / "run", **names, DATASETS__TRAIN_SIZE=0, MODEL__TEACHER__NAME="resnet8")
    save(cfg)
    os.rename(tmp_path / "data", tmp_path / "moved")
    only = ("--format", "safetensors")
    code, printed, _ = command(export, tmp_path / "run", *only)
    assert code == 0 and "checked on 32 random images, without accuracy" in printed
    assert "without the teacher resnet8: MODEL.TEACHER.WEIGHTS is empty" in printed
    assert ModelCard.load(tmp_path / "run/export/README.md").data.eval_results is None
    (tmp_path / "run/results.json").write_text(json.dumps({"top1": 12.5, "best_top1": 50.0}))
    code, printed, _ = command(export, tmp_path / "run", *only, "--images", tmp_path / "moved/val")
    assert code == 0 and f"pictures of {tmp_path / 'moved/val'}, without accuracy" in printed
    (known,) = ModelCard.load(tmp_path / "run/export/README.md").data.eval_results
    assert (known.metric_type, known.metric_value) == ("top1", 12.5)
    code, printed, _ = command(export, tmp_path / "run", "DATASETS.ROOT", tmp_path / "moved", *only)
    assert code == 0 and "test images of folder" in printed and "top1" in printed
    for split in ("train", "val"):
        for folder in (tmp_path / "moved" / split).iterdir():
            folder.rename(folder.with_name(f"other_{folder.name}"))
    code, _, errors = command(export, tmp_path / "run", "DATASETS.ROOT", tmp_path / "moved", *only)
    assert code == 2 and "other classes than the student (other_" in errors


@pytest.mark.slow
def test_pictures_with_several_classes(tmp_path, command):
    write_colors(tmp_path / "data")
    save(multi_label_cfg(tmp_path / "data", "OUTPUT_DIR", str(tmp_path / "run")))
    code, printed, _ = command(export, tmp_path / "run", "--format", "pt2")
    assert code == 0 and "12 of 12 pictures have the same class" in printed
    card = ModelCard.load(tmp_path / "run/export/README.md")
    student, model = d2distill.load(tmp_path / "run"), d2distill.load(tmp_path / "run/export/student.pt2")
    test_set = build_dataset("multilabel", tmp_path / "data", "val")
    pictures = [test_set.load(index)[0] for index in range(len(test_set))]
    torch.testing.assert_close(predict(model, pictures), predict(student, pictures), rtol=1e-4, atol=1e-5)
    columns = zip(predict(student, pictures).T, test_set.labels.T.bool(), strict=True)
    average = [average_precision(*column).item() for column in columns]
    (known,) = card.data.eval_results
    assert (known.metric_type, known.metric_value) == ("mAP", pytest.approx(100 * sum(average) / 3, abs=0.01))
    assert model.description["multi_label"]


@pytest.mark.slow
def test_a_file_that_differs_is_seen(student, digits, tmp_path):
    job = Export(student / "student_best.pth", [], None, torch.device("cpu"))
    with torch.no_grad():
        job.student.network.fc.bias[3] += 100
    job.write("safetensors", tmp_path / "wrong.safetensors")
    row = job.check(tmp_path / "wrong.safetensors")
    known = 100 * digits[1].eq(3).double().mean().item()
    assert row.metrics["top1"] == pytest.approx(known, abs=0.01) and row.difference.startswith("1e+02 in a logit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--format", "torchscript"],
            "--format torchscript is not for classification: choose among safetensors, pt2, onnx",
        ),
        (["--format", "pt2", "--int8"], "add onnx to --format"),
        (["DATASETS.ROT", "x"], "DATASETS.ROT"),
        (["--device", "gpu"], "use cpu, cuda or auto"),
    ],
)
def test_errors_are_one_line(untrained, command, arguments, message):
    code, _, errors = command(export, untrained, *arguments)
    assert code == 2 and message in errors and errors.count("\n") == 1


def test_missing_packages_are_named(untrained, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, errors = command(export, untrained)
    assert code == 2 and "pip install onnx onnxruntime" in errors


def test_a_program_of_others_is_refused(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(2, 2),))
    torch.export.save(program, tmp_path / "other.pt2")
    with pytest.raises(CheckpointError, match=r"other\.pt2 says nothing of its classes"):
        d2distill.load(tmp_path / "other.pt2")
