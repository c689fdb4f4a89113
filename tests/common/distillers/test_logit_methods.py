"""The methods on logits, and what the base classes give to every method."""

from dataclasses import replace

import pytest
import torch

from d2distill.common.distillers import DISTILLERS, Context, Distiller, LogitDistiller, kd_loss, standardize_logits
from d2distill.common.outputs import Outputs, OutputSpec
from tests.common.distillers.single_method import build, settings
from tests.goldens.fill import array

LOGIT_METHODS = [name for name, method in DISTILLERS if issubclass(method, LogitDistiller)]
SWITCHED = [name for name in LOGIT_METHODS if not DISTILLERS.get(name).takes_sigmoid]
SIDES = ("student", "teacher")
TARGET = torch.tensor([3, 0, 9, 5, 1, 1])


@pytest.mark.parametrize("name", SWITCHED)
def test_the_switch(name):
    student, teacher = Outputs(array(4, 6, 10, scale=3)), Outputs(array(5, 6, 10, scale=3))
    plain, switched = (build(name, student, teacher, STANDARDIZE=on, WARMUP=0, WEIGHT=1.0) for on in (False, True))
    by_hand = Outputs(standardize_logits(student.logits)), Outputs(standardize_logits(teacher.logits))
    ctx, key = Context(1.0), f"loss_{name.lower()}"
    off, on = plain(student, teacher, TARGET, ctx)[key], switched(student, teacher, TARGET, ctx)[key]
    assert on.item() == pytest.approx(plain(*by_hand, TARGET, ctx)[key].item(), rel=1e-6)
    assert on.item() != pytest.approx(off.item(), rel=1e-3)
    scaled = Outputs(5 * student.logits + 3), Outputs(0.2 * teacher.logits - 1)
    assert switched(*scaled, TARGET, ctx)[key].item() == pytest.approx(on.item(), rel=1e-4)


@pytest.mark.parametrize("name", SWITCHED)
def test_standardised_gradients_are_finite(name):
    student, teacher = torch.zeros(4, 6).requires_grad_(), Outputs(1e4 * array(6, 4, 6))
    method = build(name, Outputs(student), teacher, STANDARDIZE=True, WARMUP=0)
    (value,) = method(Outputs(student), teacher, TARGET[:4] % 6, Context()).values()
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("name", LOGIT_METHODS)
def test_methods_on_a_softmax_have_the_switch(name):
    """Where a score of 0 means something of itself, there is none."""
    assert ("STANDARDIZE" in settings(name)) == (name in SWITCHED)


@pytest.mark.parametrize("name", [name for name, method in DISTILLERS if "logits" in method.needs])
@pytest.mark.parametrize("sides", [("student",), ("teacher",), ("student", "teacher")])
def test_sigmoids_are_refused_unless_the_method_is_made_for_them(name, sides):
    method = DISTILLERS.get(name)
    spec = OutputSpec(10, ((3, 8, 8), (4, 4, 4)), ((3, 8, 8), (4, 4, 4)), 4)
    # Not the first thing to be told: such networks have no column for the background.
    student, teacher = (replace(spec, sigmoid=True, num_classes=9) if side in sides else spec for side in SIDES)
    if (not method.needs_teacher and "student" not in sides) or (method.takes_sigmoid and len(sides) == 2):
        assert method(settings(name), student, teacher, 10).name == name
    else:
        kinds = "sigmoids and the .*'s one softmax" if method.takes_sigmoid else "sigmoids: choose"
        with pytest.raises(ValueError, match=f"{name} .* the {sides[0]}'s are independent {kinds}"):
            method(settings(name), student, teacher, 10)


@pytest.mark.parametrize("name", [name for name, method in DISTILLERS if "logits" not in method.needs])
def test_methods_on_features_take_any_scores(name):
    cfg, feats = settings(name), ((3, 8, 8), (4, 4, 4), (4, 2, 2), (4, 1, 1))
    norms = tuple(torch.nn.BatchNorm2d(shape[0]) for shape in feats[1:])
    spec = OutputSpec(10, feats, feats, 4, norms)
    assert DISTILLERS.get(name)(cfg, replace(spec, sigmoid=True, num_classes=9), spec, 10).name == name


def test_published_setting_of_plain_distillation():
    student, teacher = Outputs(array(4, 6, 10)), Outputs(array(5, 6, 10))
    method = build("KD", student, teacher, STANDARDIZE=True, WEIGHT=9.0, T=2.0)
    expected = 9 * kd_loss(standardize_logits(student.logits), standardize_logits(teacher.logits), 2.0)
    assert method(student, teacher, TARGET, Context())["loss_kd"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", [name for name, method in DISTILLERS if method.needs_teacher])
def test_a_missing_teacher_is_named(name):
    spec = OutputSpec(10, ((3, 8, 8), (4, 4, 4)), ((3, 8, 8), (4, 4, 4)), 4)
    with pytest.raises(ValueError, match=f"{name} needs a teacher"):
        DISTILLERS.get(name)(settings(name), spec, None, 10)


@pytest.mark.parametrize("name", ["Pop", "HALF", "training"])
def test_a_name_that_a_module_dict_cannot_hold(name):
    with pytest.raises(ValueError, match=f"cannot be called {name}: {name.lower()} is an attribute"):
        DISTILLERS.register(type(name, (Distiller,), {}))
    assert name not in DISTILLERS


def test_a_method_may_ignore_labels():
    method = build("KD", Outputs(torch.zeros(1, 3)), Outputs(torch.zeros(1, 3)))
    assert method.set_labels(torch.zeros(5, dtype=torch.long)) is None and Distiller.needs_teacher


def test_bckd_averages_the_sigmoids_of_several_teachers():
    student, one, two = (array(seed, 6, 4, scale=3).double() for seed in (28, 29, 30))
    method = build("BCKD", Outputs(student), Outputs(one))
    together = method.average([(0.25, one), (0.75, two)])
    torch.testing.assert_close(together.sigmoid(), 0.25 * one.sigmoid() + 0.75 * two.sigmoid())
    huge = method.average([(0.5, torch.tensor([[1e4, -1e4, 1e4]])), (0.5, torch.tensor([[1e4, -1e4, -1e4]]))])
    assert huge.tolist() == [pytest.approx([1e4, -1e4, 0.0], abs=1e-3)]


def test_published_defaults():
    common = {"WEIGHT": 1.0, "WARMUP": 0, "STANDARDIZE": False}
    assert settings("DIST") == {**common, "WEIGHT": 2.0, "BETA": 1.0, "GAMMA": 1.0, "T": 4.0}
    assert settings("NKD") == {**common, "GAMMA": 3.5, "T": 3.0}
    assert settings("RLD") == {**common, "WARMUP": 20, "ALPHA": 1.0, "BETA": 8.0, "ALPHA_T": 1.0, "T": 4.0}
    assert settings("BCKD") == {"WEIGHT": 1.0, "WARMUP": 0}
    assert settings("WTTM") == {**common, "WEIGHT": 3.0, "GAMMA": 0.1}
