"""The teacher beside its student: from which images it starts, when, in which mode and on which stream."""

import pytest
import torch

from d2distill.common.modules import capture_calls
from d2distill.detection.meta_arch import DistillDetector
from tests.detection.tiny_detectors import batch, build, small_cfg, step

ALIKE = {
    "TEACHER.INPUT.FORMAT": "RGB",
    "TEACHER.MODEL.PIXEL_MEAN": [123.675, 116.280, 103.530],
    "TEACHER.MODEL.PIXEL_STD": [58.395, 57.120, 57.375],
}
ARCHITECTURES = {"review_dkd_r101_r18": ALIKE, "retinanet_bckd_r101_r50": {}}


class HostImage(torch.Tensor):
    """An image that is not on the networks' device yet; counts how often it is copied there."""

    copies = 0

    def to(self, *args, **kwargs):
        HostImage.copies += 1
        return self.as_subclass(torch.Tensor)


def step_counting_copies(model):
    """Losses, copies of images to the device, and the images that each backbone was given."""
    HostImage.copies = 0
    inputs = [{**x, "image": x["image"].as_subclass(HostImage)} for x in batch()]
    with capture_calls({"student": model.backbone, "teacher": model.teacher.backbone}) as calls:
        losses = step(model, inputs)
    return losses, HostImage.copies, *(calls[side][0].args[0] for side in ("student", "teacher"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_copy_and_one_normalization_where_both_preprocess_alike(name):
    one, other = (build(small_cfg(name, **ARCHITECTURES[name])) for _ in range(2))
    other.teacher_source.takes_students_images = False
    losses, copies, student, teacher = step_counting_copies(one)
    assert copies == 2 and teacher is student
    again, copies, student, teacher = step_counting_copies(other)
    assert copies == 2 and teacher is not student and torch.equal(teacher, student)
    assert losses.keys() == again.keys() and all(torch.equal(losses[key], again[key]) for key in losses)


DIFFERENT = {
    "order of channels": {"TEACHER.INPUT.FORMAT": "BGR"},
    "mean": {"TEACHER.MODEL.PIXEL_MEAN": [1.0, 2.0, 3.0]},
    "deviation": {"TEACHER.MODEL.PIXEL_STD": [1.0, 1.0, 1.0]},
    "architecture": {
        "TEACHER.MODEL.META_ARCHITECTURE": "RetinaNet",
        "TEACHER.MODEL.RETINANET.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    },
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_a_teacher_that_preprocesses_otherwise_has_its_own_images(difference):
    settings = {**ALIKE, "DISTILL.METHODS": ["PKD"], **DIFFERENT[difference]}
    assert not build(small_cfg(**settings)).teacher_source.takes_students_images


def test_a_teacher_that_pads_otherwise_has_its_own_images():
    model = build(small_cfg(**ALIKE))
    assert model.teacher_adapter.prepares_like(model)
    model.teacher.backbone._size_divisibility = 128
    assert not model.teacher_adapter.prepares_like(model)


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("dkd_r101_r18", "roi_heads.box_head", ["teacher backbone", "backbone", "head", "teacher head"]),
        ("retinanet_bckd_r101_r50", "head", ["teacher backbone", "teacher head", "backbone", "head"]),
    ],
)
def test_only_a_head_on_proposals_waits_for_the_student(name, head, expected):
    model, order = build(small_cfg(name)), []
    for side, network in (("", model), ("teacher ", model.teacher)):
        for part, module in (("backbone", network.backbone), ("head", network.get_submodule(head))):
            module.register_forward_hook(lambda *_, part=f"{side}{part}": order.append(part))
    step(model, batch())
    assert order == expected
    order.clear()
    model.eval()(batch())
    assert order == ["backbone", "head"]


@pytest.mark.parametrize(("methods", "inference"), [(["DKD"], True), (["DKD", "PKD"], False)])
def test_inference_mode_where_logits_alone_are_handed_out(methods, inference):
    """Losses keep maps for the backward pass, which inference tensors do not allow. Autocast is the student's."""
    model = build(small_cfg("dkd_r101_r18", **{"DISTILL.METHODS": methods}))
    with (
        capture_calls({"maps": model.teacher.backbone, "logits": model.teacher.roi_heads.box_predictor}) as calls,
        torch.autocast("cpu", torch.bfloat16),
    ):
        losses = step(model, batch())
    p2 = calls["maps"][0].output["p2"]
    assert p2.is_inference() is inference and p2.dtype == torch.bfloat16 and not p2.requires_grad
    assert calls["logits"][0].output[0].is_inference() is inference
    sum(losses.values()).backward()


def test_the_streams_setting_reaches_the_teacher():
    for wanted in (True, False):
        model = build(small_cfg(SOLVER__TEACHER_STREAM=wanted))
        assert isinstance(model, DistillDetector) and model.teacher_source.own_stream is wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [*ARCHITECTURES, "retinanet_pkd_r101_r50", "dkd_r101_r18"])
def test_the_teachers_stream_changes_no_loss(name):
    """Several steps, so that memory is used again; gradients too, for which maps are kept."""

    def run(stream):
        model = build(small_cfg(name, MODEL__DEVICE="cuda", SOLVER__TEACHER_STREAM=stream))
        found = []
        for iteration in range(4):
            losses = step(model, batch(), seed=iteration, iteration=iteration)
            sum(losses.values()).backward()
            found += [value.item() for value in losses.values()]
        found += [p.grad.double().sum().item() for p in model.backbone.parameters() if p.grad is not None]
        return found

    # Atomic additions: two runs on one stream part as much.
    assert run(True) == pytest.approx(run(False), rel=5e-3)
