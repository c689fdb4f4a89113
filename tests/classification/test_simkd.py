"""SimKD: the teacher's classifier at the student's end, trained, evaluated, saved and loaded as one network."""

import pytest
import torch
from torch.nn import functional as F

from d2distill.classification.trainer import evaluate
from d2distill.common.distillers import DISTILLERS, simkd_loss
from d2distill.common.errors import ConfigError
from tests.classification.distill_models import build, make_batch
from tests.classification.tiny_training import run, small_cfg

TRAINED = {"DATASETS__TRAIN_SIZE": 300, "SOLVER__EPOCHS": 6, "SOLVER__STEPS": [5], "TEST__EVAL_PERIOD": 6}


def test_the_loss_by_hand():
    """Means of squares: ((1 - 3)^2 + (2 - 2)^2) / 2 = 2."""
    student = torch.tensor([[[[1.0, 2.0]]]])
    assert simkd_loss(student, torch.tensor([[[[3.0, 2.0]]]])) == 2
    # A larger teacher's map is averaged to (2, 2): ((1 - 2)^2 + 0) / 2.
    assert simkd_loss(student, torch.tensor([[[[1.0, 3.0, 2.0, 2.0]]]])) == 0.5


def test_the_term_is_the_distance_of_the_map_that_the_teacher_pools():
    model, batch = build("SimKD", teacher="wrn_16_1"), make_batch()
    method = model.distillers["simkd"].eval()
    model.student.eval()
    images = model.student_norm(batch["image"])
    teacher = model.teacher.outputs(model.teacher_norms[0](batch["image"]))
    feat = F.relu(teacher.preacts[-1])  # a WRN's stages end before the batch norm and ReLU that are pooled
    torch.testing.assert_close(feat.mean((2, 3)), teacher.pooled)
    expected = F.mse_loss(method.projector(model.student.outputs(images).feats[-1]), feat)
    torch.testing.assert_close(model(batch)["loss_simkd"], expected)


@pytest.mark.parametrize("student", ["resnet8", "MobileNetV2", "vgg8"])
def test_the_deployed_network(student):
    model, batch = build("SimKD", student=student), make_batch()
    deployed = model.eval().deployed_student()
    images = model.student_norm(batch["image"])
    method = model.distillers["simkd"]
    by_hand = model.teacher.classifier_layer(method.projector(model.student.outputs(images).feats[-1]).mean((2, 3)))
    assert torch.equal(deployed(images), model(batch))
    torch.testing.assert_close(model(batch), by_hand)
    torch.testing.assert_close(method.predict(model.student.outputs(images)), by_hand)
    assert torch.equal(deployed.outputs(images).logits, deployed(images))
    # The student's own classifier is not shipped, and the student keeps it.
    own = {id(p) for p in model.student.classifier_layer.parameters()}
    shipped = {id(p) for p in deployed.parameters()}
    assert own and not own & shipped and {id(p) for p in model.student.parameters()} - own <= shipped
    assert model.student.classifier_layer.training is False and len(deployed.state_dict()) < len(model.state_dict())


def test_training_moves_the_projector_and_not_the_classifier():
    model, batch = build("SimKD", "DISTILL.CE_WEIGHT", 0.0), make_batch()
    method = model.distillers["simkd"]
    before = {name: value.clone() for name, value in method.classifier.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(20):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(before[name], value) for name, value in method.classifier.state_dict().items())


@pytest.mark.slow
def test_a_run_is_evaluated_saved_and_loaded_as_one_network(tmp_path):
    settings = {"DISTILL__METHODS": ["SimKD"], "DISTILL__CE_WEIGHT": 0.0, "SOLVER__EMA_DECAY": 0.5}
    results = run(small_cfg(tmp_path, **settings))
    # The teacher, whose weights are random here, is not needed again.
    cfg = small_cfg(tmp_path, **settings)
    cfg.MODEL.STUDENT.WEIGHTS = str(tmp_path / "student_final.pth")
    assert evaluate(cfg)["top1"] == results["top1"]
    cfg = small_cfg(tmp_path, **settings)
    cfg.MODEL.STUDENT.WEIGHTS = str(tmp_path / "student_ema_final.pth")
    assert evaluate(cfg)["top1"] == results["ema_top1"]
    names = torch.load(tmp_path / "student_final.pth", weights_only=True)["model"].keys()
    assert {name.split(".")[0] for name in names} == {"body", "projector", "classifier"}
    assert not any(name.startswith("body.fc") for name in names)


def test_teachers_that_it_cannot_use():
    with pytest.raises(ConfigError, match="which must take the average of its last map: this teacher's map has 160"):
        build("SimKD", teacher="MobileNetV2")  # a convolution comes between its last map and the pool
    with pytest.raises(ConfigError, match=r"\['SimKD', 'Other'\] each change the deployed student"):
        with_other()


def with_other():
    class Other(DISTILLERS.get("SimKD")):
        pass

    DISTILLERS.register(Other)
    try:
        build(["SimKD", "Other"])
    finally:
        DISTILLERS._obj_map.pop("Other")


@pytest.mark.slow
def test_it_learns_where_a_teacher_knows(tmp_path):
    """On digits: far better than chance after 6 epochs on 300 images, through the classifier of a trained teacher."""
    teacher = run(small_cfg(tmp_path / "t", MODEL__STUDENT__NAME="resnet8", **{**TRAINED, "DISTILL__METHODS": []}))
    weights = {"MODEL__TEACHER__NAME": "resnet8", "MODEL__TEACHER__WEIGHTS": str(tmp_path / "t" / "student_final.pth")}
    settings = {**TRAINED, **weights, "DISTILL__METHODS": ["SimKD"], "DISTILL__CE_WEIGHT": 0.0}
    student = run(small_cfg(tmp_path / "s", **settings))
    assert teacher["top1"] > 50 and student["top1"] > 50
