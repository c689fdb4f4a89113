"""Students that are used: described in their files, loaded in one line; and the teacher that is measured beforehand."""

import json

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import d2distill
from d2distill.classification.data import build_dataset
from d2distill.classification.modeling import build_distiller
from d2distill.classification.trainer import build_trainer, load_datasets
from d2distill.common.errors import CheckpointError
from tests.classification.tiny_training import run, small_cfg

pytestmark = pytest.mark.slow

MEAN = [120.0, 110.0, 100.0]
LONG = {
    "MODEL__STUDENT__PIXEL_MEAN": MEAN,
    "SOLVER__EPOCHS": 5,
    "SOLVER__STEPS": [3],
    "DATASETS__TRAIN_SIZE": 400,
    "INPUT__SIZE": 32,
    "TEST__EVAL_PERIOD": 5,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that shows what there is: a teacher, SimKD's student of three parts, statistics that are set."""
    folder = tmp_path_factory.mktemp("runs")
    assert run(small_cfg(folder / "teacher", **LONG, DISTILL__METHODS=[]))["top1"] > 40
    weights = str(folder / "teacher/student_final.pth")
    settings = {"DISTILL__METHODS": ["SimKD"], "MODEL__TEACHER__NAME": "resnet8", "MODEL__TEACHER__WEIGHTS": weights}
    results = run(small_cfg(folder / "student", **LONG, **settings))
    assert results["top1"] > 40
    return folder, results


def test_a_student_is_loaded_in_one_line(trained, monkeypatch, tmp_path):
    folder, results = trained
    monkeypatch.chdir(tmp_path)
    student = d2distill.load(folder / "student")
    assert student.classes == [str(digit) for digit in range(10)] and not student.training
    images = build_dataset("digits", split="val")
    inputs = torch.stack([student.preprocess(to_pil_image(images.load(index)[0])) for index in range(len(images))])
    assert student(inputs).argmax(1).eq(images.labels).double().mean() * 100 == pytest.approx(results["top1"])
    std = torch.tensor(images.info.pixel_std).view(3, 1, 1)
    torch.testing.assert_close(inputs[0], (images.load(0)[0] - torch.tensor(MEAN).view(3, 1, 1)) / std)


def test_the_run_folder_says_what_the_student_is_made_of(trained):
    folder, _ = trained
    described = json.loads((folder / "student/student.json").read_text())
    content = torch.load(folder / "student/student_final.pth", weights_only=True)
    assert json.loads(content["d2distill"]) == described and set(content) == {"model", "d2distill"}
    assert described["network"] == "resnet8 + SimKD" and described["preprocess"]["mean"] == MEAN
    assert len(described["made_from"]["MODEL.TEACHER.WEIGHTS 0"]["sha256"]) == 64
    assert described["made_from"]["DATASETS"]["training images"]["number"] == 400
    # Stock libraries: the entry "model" is the state dict.
    network = d2distill.load(folder / "teacher").network
    network.load_state_dict(torch.load(folder / "teacher/student_final.pth", weights_only=True)["model"])


def test_a_teacher_is_fed_as_in_its_training(trained, tmp_path):
    """Its own file says how; a setting overrides it."""
    folder, _ = trained
    weights = {"MODEL__TEACHER__NAME": "resnet8", "MODEL__TEACHER__WEIGHTS": str(folder / "teacher/student_final.pth")}
    model = build_distiller(small_cfg(tmp_path, **weights))
    assert model.teacher_norms[0].mean.flatten().tolist() == MEAN
    assert model.student_norm.mean.flatten().tolist() != MEAN
    model = build_distiller(small_cfg(tmp_path, **weights, MODEL__TEACHER__PIXEL_MEAN=[1.0, 2.0, 3.0]))
    assert model.teacher_norms[0].mean.flatten().tolist() == [1.0, 2.0, 3.0]


def test_the_teacher_is_measured_before_it_teaches(trained, tmp_path, monkeypatch):
    folder, _ = trained
    weights, results = (json.loads((folder / name / "results.json").read_text()) for name in ("teacher", "student"))
    assert results["teacher_top1"] == weights["top1"] > 40
    # Once per teacher and data set: another run finds it.
    monkeypatch.setattr("d2distill.classification.trainer.inference_on_dataset", lambda *_: pytest.fail("measured"))
    teacher = {"MODEL__TEACHER__NAME": "resnet8", "MODEL__TEACHER__WEIGHTS": str(folder / "teacher/student_final.pth")}
    teacher["INPUT__SIZE"] = 32
    cfg = small_cfg(tmp_path, **teacher)
    assert build_trainer(cfg, *load_datasets(cfg)).task.facts()["teacher_top1"] == weights["top1"]
    cfg = small_cfg(tmp_path, **teacher, TEST__TEACHER=False)
    assert "teacher_top1" not in build_trainer(cfg, *load_datasets(cfg)).task.facts()


def test_a_teacher_near_chance_is_named(trained, tmp_path, caplog):
    """Here it has the classes in another order, the usual fault."""
    folder, _ = trained
    network = d2distill.load(folder / "teacher").network
    with torch.no_grad():
        for parameter in network.classifier_layer.parameters():
            parameter.copy_(parameter.roll(1, 0))
    torch.save(network.state_dict(), tmp_path / "teacher.pth")
    teacher = {"MODEL__TEACHER__NAME": "resnet8", "MODEL__TEACHER__WEIGHTS": str(tmp_path / "teacher.pth")}
    cfg = small_cfg(tmp_path / "run", **teacher, MODEL__TEACHER__PIXEL_MEAN=MEAN)
    build_trainer(cfg, *load_datasets(cfg))
    assert "is near chance" in caplog.text


def test_what_is_no_student_is_refused(trained, tmp_path):
    folder, _ = trained
    weights = torch.load(folder / "teacher/student_final.pth", weights_only=True)
    torch.save({"model": weights["model"]}, tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="no description"):
        d2distill.load(tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match=r"no student_best\.pth"):
        d2distill.load(tmp_path)
    described = json.loads(weights["d2distill"])
    described["config"] = described["config"].replace("resnet8", "my_own_net")
    described["imports"] = ["nets.py"]
    torch.save({"model": weights["model"], "d2distill": json.dumps(described)}, tmp_path / "own.pth")
    with pytest.raises(CheckpointError, match=r"unknown model 'my_own_net'.*import nets.py first"):
        d2distill.load(tmp_path / "own.pth")
