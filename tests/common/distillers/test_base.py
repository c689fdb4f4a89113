"""What the base classes give to every method, and what every method makes of its settings and inputs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from d2distill.common import distillers as d
from d2distill.common.distillers import DISTILLERS
from d2distill.common.outputs import Batch, NetworkInfo, Outputs, Progress, TrainingData
from tests.common.distillers.single_method import build
from tests.goldens.fill import array

METHODS = [name for name, _ in DISTILLERS]
ON_LOGITS = [name for name, method in DISTILLERS if "logits" in method.needs]
SIDES = ("student", "teacher")
TARGET = torch.tensor([3, 0, 9, 5])
BATCH = Batch(TARGET, index=torch.arange(4))


def info(channels):
    """Of a network whose middle map has so many channels."""
    shapes = ((3, 8, 8), (channels, 4, 4), (6, 2, 2))
    module = SimpleNamespace(bn_before_relu=[nn.BatchNorm2d(channels), nn.BatchNorm2d(6)])
    return NetworkInfo(10, shapes, shapes, 6, classifier=nn.Linear(6, 10), module=module)


INFO, TEACHER = info(4), info(5)


def outputs(seed, info, scale=1.0, dtype=torch.float32):
    preacts = [array(seed + i, 4, *shape, scale=scale).to(dtype).requires_grad_() for i, shape in enumerate(info.feats)]
    feats = [m.detach().relu().requires_grad_() for m in preacts]
    pooled = feats[-1].detach().mean((2, 3)).requires_grad_()
    return Outputs(array(seed + 9, 4, 10, scale=scale).to(dtype).requires_grad_(), feats, preacts, pooled)


def make(name, **changed):
    torch.manual_seed(0)
    return build(name, INFO, TEACHER if DISTILLERS.get(name).needs_teacher else None, TrainingData(40), **changed)


def run(method, student, teacher):
    torch.manual_seed(1)
    teacher = replace(teacher, extras=dict.fromkeys(method.teacher_extras, teacher.preacts))
    return method(student, teacher if method.needs_teacher else None, BATCH)


@pytest.mark.parametrize(
    ("name", "changed", "loss"),
    [
        ("KD", {"T": 2.0}, lambda s, t: d.kd_loss(s.logits, t.logits, 2.0)),
        ("DKD", {"BETA": 2.0, "ALPHA": 3.0}, lambda s, t: d.dkd_loss(s.logits, t.logits, TARGET, 3.0, 2.0, 4.0)),
        ("DIST", {"BETA": 2.0, "GAMMA": 3.0}, lambda s, t: d.dist_loss(s.logits, t.logits, 2.0, 3.0, 4.0)),
        ("NKD", {"GAMMA": 2.0}, lambda s, t: d.nkd_loss(s.logits, t.logits, TARGET, 2.0, 3.0)),
        (
            "RLD",
            {"ALPHA": 2.0, "BETA": 3.0, "ALPHA_T": 5.0},
            lambda s, t: d.rld_loss(s.logits, t.logits, TARGET, 2.0, 3.0, 5.0, 4.0),
        ),
        ("WTTM", {"GAMMA": 0.2}, lambda s, t: d.wttm_loss(s.logits, t.logits, 0.2)),
        ("BCKD", {}, lambda s, t: d.bckd_loss(s.logits, t.logits, TARGET)),
        ("AT", {"P": 3.0}, lambda s, t: d.at_loss(s.feats[1:], t.feats[1:], 3.0)),
        ("NST", {"FIRST": 2}, lambda s, t: d.nst_loss(s.feats[2:], t.feats[2:])),
        ("KDSVD", {"K": 2}, lambda s, t: d.kdsvd_loss(s.feats[1:], t.feats[1:], 2)),
        ("SP", {}, lambda s, t: d.sp_loss(s.feats[-1:], t.feats[-1:])),
        ("PKT", {"EPS": 0.1}, lambda s, t: d.pkt_loss(s.pooled, t.pooled, 0.1)),
        (
            "RKD",
            {"DISTANCE_WEIGHT": 2.0, "ANGLE_WEIGHT": 3.0, "SQUARED": True, "EPS": 0.1},
            lambda s, t: d.rkd_loss(s.pooled, t.pooled, 2.0, 3.0, True, 0.1),
        ),
        ("PKD", {"FIRST": 2}, lambda s, t: d.pkd_loss(s.feats[2:], t.feats[2:])),
        ("CWD", {"T": 2.0, "FIRST": 2}, lambda s, t: d.cwd_loss(s.feats[2:], t.feats[2:], 2.0)),
    ],
)
def test_a_method_is_its_loss_with_its_settings(name, changed, loss):
    student, teacher = outputs(1, INFO), outputs(50, TEACHER)
    torch.testing.assert_close(run(make(name, **changed), student, teacher), loss(student, teacher))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_no_digit_of_huge_inputs(name, dtype):
    student, teacher = outputs(1, INFO, 1e4, dtype), outputs(50, TEACHER, 1e4, dtype)
    plain = run(make(name), student, teacher)
    for autocast in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", autocast):
            value = run(make(name), student, teacher)
        assert value.dtype == torch.float32 and value.isfinite() and torch.equal(value, plain)
    value.backward()
    grads = [x.grad for x in (student.logits, *student.feats, *student.preacts, student.pooled) if x.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


def test_the_weight_grows_to_its_full_value():
    """Over WARMUP epochs, or steps where a task counts no epochs; both are counted from 1."""
    method = make("KD", WEIGHT=6.0, WARMUP=4)
    assert [method.weight(Progress(99, epoch)) for epoch in (1, 2.5, 4, 9)] == [1.5, 3.75, 6.0, 6.0]
    assert [method.weight(Progress(step)) for step in (0, 1, 3, 9)] == [1.5, 3.0, 6.0, 6.0]
    assert make("KD", WEIGHT=6.0).weight(Progress(0)) == 6.0


@pytest.mark.parametrize("name", ON_LOGITS)
@pytest.mark.parametrize("sides", [("student",), ("teacher",), SIDES])
def test_sigmoids_are_refused_unless_the_method_is_made_for_them(name, sides):
    method = DISTILLERS.get(name)
    # Not the first thing to be told: such networks have no column for the background.
    networks = [replace(INFO, sigmoid=True, num_classes=9) if side in sides else INFO for side in SIDES]
    if (not method.needs_teacher and "student" not in sides) or (method.takes_sigmoid and len(sides) == 2):
        assert build(name, *networks).name == name
    else:
        kinds = "sigmoids and the .*'s one softmax" if method.takes_sigmoid else "sigmoids: BCKD can take those"
        with pytest.raises(ValueError, match=f"{name} .* the {sides[0]}'s are independent {kinds}"):
            build(name, *networks)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in (*ON_LOGITS, "SimKD")])
def test_methods_on_features_need_no_classes(name):
    for student in (replace(INFO, sigmoid=True, num_classes=9), replace(INFO, num_classes=None, classifier=None)):
        assert build(name, student, replace(INFO, num_classes=None, classifier=None), TrainingData(40)).name == name


@pytest.mark.parametrize("name", METHODS)
def test_a_missing_network_or_part_is_named(name):
    needs_teacher = DISTILLERS.get(name).needs_teacher
    if needs_teacher:
        with pytest.raises(ValueError, match=f"{name} needs a teacher, but there is none"):
            build(name, INFO, None, TrainingData(40))
    for part in DISTILLERS.get(name).needs:
        without = replace(INFO, **{"num_classes" if part == "logits" else part: None})
        for side in SIDES[: 1 + needs_teacher]:
            of = "both networks" if needs_teacher else "the student"
            with pytest.raises(ValueError, match=f"{name} needs the {part} of {of}, but the {side} gives none"):
                build(name, *(without if side == one else INFO for one in SIDES), TrainingData(40))


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (10, 9, "the student has 10 classes and the teacher 9"),
        (1, 1, "compares classes with each other, but there is 1"),
    ],
)
def test_class_counts_that_cannot_be_compared(student, teacher, message):
    with pytest.raises(ValueError, match=f"KD .*{message}"):
        build("KD", NetworkInfo(student), NetworkInfo(teacher))


def test_bckd_averages_the_sigmoids_of_several_teachers():
    one, two = (array(seed, 6, 4, scale=3).double() for seed in (29, 30))
    method = make("BCKD")
    together = method.average([(0.25, one), (0.75, two)], 1.0)
    torch.testing.assert_close(together.sigmoid(), 0.25 * one.sigmoid() + 0.75 * two.sigmoid())
    huge = method.average([(0.5, torch.tensor([[1e4, -1e4, 1e4]])), (0.5, torch.tensor([[1e4, -1e4, -1e4]]))], 1.0)
    assert huge.tolist() == [pytest.approx([1e4, -1e4, 0.0], abs=1e-3)]


def test_uskd_by_hand():
    student, method = outputs(1, INFO), make("USKD", ALPHA=2.0, BETA=0.3, MU=0.5)
    weak = student.feats[1].mean((2, 3)) @ method.head.weight.T + method.head.bias
    value = run(method, student, student)
    torch.testing.assert_close(value, d.uskd_loss(student.logits, weak, TARGET, 2.0, 0.3, 0.5))
    value.backward()
    # The weak classifier is trained, and trains what lies before it.
    assert method.head.weight.grad.any() and student.feats[1].grad.any() and student.feats[2].grad is None
    with pytest.raises(ValueError, match="map before the last"):
        build("USKD", replace(INFO, feats=INFO.feats[:1]))
