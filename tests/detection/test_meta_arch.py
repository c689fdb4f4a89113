"""Students with a teacher at their side: what is computed, how often, and from what."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from fvcore.common.config import CfgNode
from torch import nn

from d2distill.common.distillers import DISTILLERS, Distiller, dkd_loss
from d2distill.common.errors import ConfigError
from d2distill.common.modules import capture_calls
from d2distill.common.outputs import Batch, Outputs, Progress
from d2distill.detection.meta_arch.base import crop_to_common_size, feature_strides
from tests.detection.tiny_detectors import batch, build, image, plain, small_cfg, step

ARCHITECTURES = ["review_dkd_r101_r18", "retinanet_bckd_r101_r50"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_methods_the_losses_are_detectron2s(name):
    cfg = small_cfg(name, DISTILL__METHODS=[])
    ours, theirs = build(cfg), build(plain(cfg))
    theirs.load_state_dict(ours.state_dict())
    assert ours.teacher is None
    a, b = step(ours, batch()), step(theirs, batch())
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_methods_the_detectors_own_losses_are_unchanged(name):
    cfg = small_cfg(name)
    ours, theirs = build(cfg), build(plain(cfg))
    # The student is built first: its weights do not depend on teacher and methods.
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    a, b = step(ours, batch()), step(theirs, batch())
    assert all(torch.equal(a[key], b[key]) for key in b)
    assert list(a)[len(b) :] == [f"loss_{method.lower()}" for method in cfg.DISTILL.METHODS]
    assert all(a[key].ndim == 0 and a[key] > 0 for key in list(a)[len(b) :])


def rows(model, inputs):
    """Student's and teacher's logits and the target, computed again the long way round."""
    heads, teacher = model.roi_heads, model.teacher
    torch.manual_seed(7)
    from detectron2.utils.events import EventStorage

    with EventStorage(), torch.no_grad():
        features = model.backbone(model.preprocess_image(inputs).tensor)
        gt = [x["instances"] for x in inputs]
        proposals, _ = model.proposal_generator(model.preprocess_image(inputs), features, gt)
        sampled = heads.label_and_sample_proposals(proposals, gt)
        boxes = [p.proposal_boxes for p in sampled]
        maps = teacher.backbone(teacher.preprocess_image([{"image": x["image"].flip(0)} for x in inputs]).tensor)

        def scores(heads, maps):
            return heads.box_predictor(heads.box_head(heads.box_pooler([maps[f"p{i}"] for i in range(2, 6)], boxes)))[0]

        return scores(heads, features), scores(teacher.roi_heads, maps), torch.cat([p.gt_classes for p in sampled])


def test_dkd_is_dkd_loss_of_the_proposals_logits():
    model = build(small_cfg("dkd_r101_r18"))
    losses = step(model, batch())
    student, teacher, target = rows(model, batch())
    assert student.shape == teacher.shape == (32, 6) and 5 in target and (target < 5).any()
    assert torch.allclose(losses["loss_dkd"], dkd_loss(student, teacher, target, 1.0, 0.25, 1.0), rtol=1e-6, atol=0)


def test_reviewkd_is_the_class_of_classification():
    model = build(small_cfg("reviewkd_r101_r18"))
    method = model.distillers["reviewkd"]
    assert type(method) is DISTILLERS.get("ReviewKD") and len(method.fusions) == 5
    method.eval()
    with capture_calls({"student": model.backbone, "teacher": model.teacher.backbone}) as calls:
        torch.manual_seed(7)
        model.training = True  # alone: batch norms of the fusions stay in eval mode
        from detectron2.utils.events import EventStorage

        with EventStorage():
            losses = model(batch())
    sides = [Outputs(feats=[calls[side][0].output[f"p{i}"] for i in range(2, 7)]) for side in ("student", "teacher")]
    assert torch.equal(losses["loss_reviewkd"], method(*sides, Batch()) * method.weight(Progress()))


def test_boxes_are_those_the_students_head_saw():
    """With TRAIN_ON_PRED_BOXES they are replaced afterwards."""
    settings = {"MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True}
    model, other = build(small_cfg("dkd_r101_r18", **settings)), build(small_cfg("dkd_r101_r18"))
    assert torch.equal(step(model, batch())["loss_dkd"], step(other, batch())["loss_dkd"])


def test_connectors_begin_alike_with_any_teacher():
    """And a teacher is in eval mode from the beginning."""
    one, other = build(small_cfg()), build(small_cfg(**{"TEACHER.MODEL.RESNETS.DEPTH": 101}))
    begun, same = one.distillers.state_dict(), other.distillers.state_dict()
    assert begun and begun.keys() == same.keys() and all(torch.equal(begun[name], same[name]) for name in begun)
    assert not any(module.training for module in one.teacher.modules())


def test_the_teachers_head_takes_the_levels_it_was_built_for():
    model = build(small_cfg("dkd_r101_r18", **{"TEACHER.MODEL.ROI_HEADS.IN_FEATURES": ["p3", "p4", "p5"]}))
    with capture_calls({"pooler": model.teacher.roi_heads.box_pooler}) as calls:
        step(model, batch())
    maps, _ = calls["pooler"][0].args
    assert [max(feat.shape[2:]) for feat in maps] == [16, 8, 4]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_part_runs_once_a_step(name):
    model, counts = build(small_cfg(name)), {}
    parts = {"student": model.backbone, "teacher": model.teacher.backbone}
    heads = ["head"] if "retinanet" in name else ["roi_heads.box_head", "roi_heads.box_predictor"]
    for side, network in (("student", model), ("teacher", model.teacher)):
        parts.update({f"{side} {part}": network.get_submodule(part) for part in heads})
    for part, module in parts.items():
        module.register_forward_hook(lambda *_, part=part: counts.update({part: counts.get(part, 0) + 1}))
    step(model, batch())
    assert counts == dict.fromkeys(parts, 1)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "reviewkd_r101_r18_mask"])
def test_gradients_reach_student_and_connectors_but_not_the_teacher(name):
    model = build(small_cfg(name))
    before = {key: value.clone() for key, value in model.teacher.state_dict().items()}
    losses = step(model, batch(masks=True))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.distillers.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert any(p.grad.abs().sum() > 0 for p in model.backbone.parameters() if p.requires_grad)
    assert not model.teacher.training and not any(module.training for module in model.teacher.modules())
    assert all(torch.equal(before[key], value) for key, value in model.teacher.state_dict().items())


@pytest.mark.parametrize("name", [*ARCHITECTURES, "retinanet_pkd_r101_r50", "fitnet_r101_r50", "mgd_r101_r50"])
def test_each_method_gives_the_students_backbone_a_gradient(name):
    """By itself: the detector's own losses, and connectors that learn, would hide one that does not."""
    model = build(small_cfg(name))
    losses = step(model, batch())
    student = [p for p in model.backbone.parameters() if p.requires_grad]
    for method in model.distillers:
        gradients = torch.autograd.grad(losses[f"loss_{method}"], student, retain_graph=True, allow_unused=True)
        assert any(gradient is not None and gradient.any() for gradient in gradients), method


def test_a_method_without_a_teacher_is_given_none():
    class Alone(Distiller):
        needs, needs_teacher = (), False

        def forward(self, student, teacher, batch):
            return torch.tensor(float(teacher is None))

    model = build(small_cfg("pkd_r101_r50"))
    model.distillers["alone"] = Alone(CfgNode({"WEIGHT": 3.0, "WARMUP": 0}), None)
    losses = step(model, batch())
    assert losses["loss_alone"] == 3 and losses["loss_pkd"] > 0


def test_methods_see_boxes_sizes_and_progress():
    """And the outputs of any submodule that they name, of both networks."""
    seen = {}

    class Looking(Distiller):
        needs = ("feats", "module:backbone.bottom_up.res5", "module:roi_heads.box_head")

        def forward(self, student, teacher, batch):
            seen.update(student=student, teacher=teacher, batch=batch)
            return student.feats[0].sum() * 0

    DISTILLERS.register(Looking)
    try:
        cfg = small_cfg("pkd_r101_r50", **{"DISTILL.METHODS": ["Looking"], "SOLVER.MAX_ITER": 8})
        step(build(cfg), batch(), iteration=2)
    finally:
        DISTILLERS._obj_map.pop("Looking")
    assert (seen["batch"].progress.step, seen["batch"].progress.fraction) == (2, 0.25)
    assert [boxes.shape[1] for boxes in seen["batch"].boxes] == [4, 4]
    assert seen["batch"].image_sizes == [tuple(x["image"].shape[1:]) for x in batch()]
    for side in ("student", "teacher"):
        assert seen[side].extras["module:backbone.bottom_up.res5"].ndim == 4
        assert seen[side].extras["module:roi_heads.box_head"].ndim == 2


def test_levels_go_from_fine_to_coarse_whatever_their_names():
    shapes = {"p10": ShapeSpec(stride=8), "p9": ShapeSpec(stride=4), "a": ShapeSpec(stride=16)}
    assert list(feature_strides(SimpleNamespace(output_shape=lambda: shapes)).items()) == [
        ("p9", 4),
        ("p10", 8),
        ("a", 16),
    ]


def test_the_state_dict_is_plain_detectron2s_beside_the_methods():
    cfg = small_cfg()
    model, stock = build(cfg), build_model(plain(cfg))
    names = set(model.state_dict())
    assert {name.split(".")[0] for name in names} == {"backbone", "proposal_generator", "roi_heads", "distillers"}
    assert {name for name in names if not name.startswith("distillers.")} == set(stock.state_dict())
    model.load_state_dict(model.state_dict())


def test_the_teacher_normalizes_for_itself():
    """BGR teacher of an RGB student: flipped first, then its own mean and deviation, then its own padding."""
    model = build(small_cfg(**{"TEACHER.MODEL.PIXEL_MEAN": [10.0, 20.0, 30.0], "TEACHER.MODEL.PIXEL_STD": [1.0, 2, 4]}))
    inputs = batch()
    seen = model.teacher_adapter.images(inputs)
    first = inputs[0]["image"].float().flip(0)
    expected = (first - torch.tensor([10.0, 20, 30])[:, None, None]) / torch.tensor([1.0, 2, 4])[:, None, None]
    assert torch.equal(seen[0, :, :96, :128], expected)
    same = build(small_cfg(**{"TEACHER.INPUT.FORMAT": "RGB"}))
    assert torch.allclose(
        same.teacher_adapter.images(inputs)[0][:, :96, :128] + 0, inputs[0]["image"] - same.teacher.pixel_mean
    )
    with pytest.raises(ConfigError, match=r"TEACHER.INPUT.FORMAT is L, but the student's images are RGB"):
        build(small_cfg(**{"TEACHER.INPUT.FORMAT": "L"}))


def test_maps_of_networks_with_other_padding_are_cut_to_what_both_have():
    a, b = crop_to_common_size(torch.arange(24.0).reshape(1, 1, 4, 6), torch.zeros(1, 2, 5, 3))
    assert a.shape == (1, 1, 4, 3) and b.shape == (1, 2, 4, 3) and a[0, 0, 1].tolist() == [6, 7, 8]
    model = build(small_cfg("pkd_r101_r50"))
    model.teacher.backbone._size_divisibility = 128
    model.teacher_source.takes_students_images = model.teacher_adapter.prepares_like(model)
    assert torch.isfinite(step(model, batch())["loss_pkd"])


EMPTY = {
    "no boxes": [image([], []), image([[5, 8, 40, 44]], [2])],
    "no boxes at all": [image([], []), image([], [], size=(64, 64))],
}


@pytest.mark.parametrize("name", ["review_dkd_r101_r18", "retinanet_bckd_r101_r50", "retinanet_pkd_r101_r50"])
@pytest.mark.parametrize("case", EMPTY)
def test_batches_with_nothing_to_detect(name, case):
    model = build(small_cfg(name))
    losses = step(model, EMPTY[case])
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


class NoProposals(nn.Module):
    """A proposal generator that finds nothing."""

    def forward(self, images, features, gt_instances=None):
        proposals = [Instances(size) for size in images.image_sizes]
        for p in proposals:
            p.proposal_boxes, p.objectness_logits = Boxes(torch.zeros(0, 4)), torch.zeros(0)
        return proposals, {}


@pytest.mark.parametrize("method", ["DKD", "KD", "DIST", "NKD", "RLD"])
def test_zero_proposals(method):
    cfg = small_cfg(**{"DISTILL.METHODS": [method], "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": False})
    model = build(cfg)
    model.proposal_generator = NoProposals()
    losses = step(model, batch())
    assert losses[f"loss_{method.lower()}"] == 0
    sum(losses.values()).backward()
    assert torch.isfinite(model.roi_heads.box_predictor.cls_score.weight.grad).all()
    assert all(len(result["instances"]) == 0 for result in model.eval()(batch()))


def test_warm_up_counts_iterations():
    model = build(small_cfg("dkd_r101_r18", **{"DISTILL.DKD.WARMUP": 4}))
    full = step(model, batch(), iteration=9)["loss_dkd"]
    assert torch.allclose(step(model, batch(), iteration=0)["loss_dkd"], full / 4)
    assert torch.allclose(step(model, batch(), iteration=2)["loss_dkd"], full * 3 / 4)


def test_autocast():
    model = build(small_cfg())
    with torch.autocast("cpu", torch.bfloat16):
        losses = step(model, batch())
    assert all(torch.isfinite(value) for value in losses.values()) and losses["loss_dkd"].dtype == torch.float32
    sum(losses.values()).backward()


WITHOUT_P2 = {
    "TEACHER.MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "TEACHER.MODEL.RPN.IN_FEATURES": ["p3", "p4", "p5", "p6"],
    "TEACHER.MODEL.ROI_HEADS.IN_FEATURES": ["p3", "p4", "p5"],
    "TEACHER.MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256]],
}
CASCADE = {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
ONE_SIZE = {"TEACHER.MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]]}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "dkd_r101_r18",
            {"TEACHER.MODEL.ROI_HEADS.NUM_CLASSES": 7},
            r"DKD .* student has 5 classes \(MODEL\.ROI_HEADS\.NUM_CLASSES\) and the teacher 7 \(TEACHER\.MODEL\.ROI",
        ),
        ("dkd_r101_r18", CASCADE, "one box predictor, but the student has CascadeROIHeads"),
        ("pkd_r101_r50", WITHOUT_P2, r"the student's have the strides {'p2': 4, .* teacher's {'p3': 8"),
        ("retinanet_bckd_r101_r50", ONE_SIZE, "differ in their anchors"),
        ("retinanet_bckd_r101_r50", {"TEACHER.MODEL.RETINANET.NUM_CLASSES": 7}, r"student has 5 .* teacher 7 "),
        ("retinanet_bckd_r101_r50", {"DISTILL.METHODS": ["DKD"]}, "sigmoid"),
        ("dkd_r101_r18", {"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True}, "sigmoid"),
        ("dkd_r101_r18", {"DISTILL.METHODS": ["OFD"]}, "OFD takes its margins"),
        ("dkd_r101_r18", {"DISTILL.METHODS": ["CRD"]}, "CRD needs the pooled"),
        ("dkd_r101_r18", {"DISTILL.METHODS": ["USKD"]}, "USKD needs the pooled of the student"),
        ("reviewkd_r101_r18", {"DISTILL.REVIEWKD.TEACHER": 1}, "one teacher"),
        ("dkd_r101_r18", {"MODEL.META_ARCHITECTURE": "GeneralizedRCNN"}, "need MODEL.META_ARCHITECTURE DistillRCNN"),
        ("dkd_r101_r18", {"MODEL.META_ARCHITECTURE": "DistilRCNN"}, "did you mean DistillRCNN"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_before_training(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(small_cfg(name, **settings))


@pytest.mark.parametrize(
    ("name", "methods", "head"),
    [("reviewkd_r101_r18", ["ReviewKD", "PKD", "CWD", "MGD", "FitNet"], "ROI_HEADS"),
     ("retinanet_pkd_r101_r50", ["PKD"], "RETINANET")],
)  # fmt: skip
def test_a_teacher_of_other_classes_teaches_features(name, methods, head, tmp_path, log):
    settings = {"DISTILL.METHODS": methods, f"TEACHER.MODEL.{head}.NUM_CLASSES": 8}
    torch.save({"model": build(small_cfg(name, **settings)).teacher.state_dict()}, tmp_path / "teacher.pth")
    model = build(small_cfg(name, **settings, **{"TEACHER.MODEL.WEIGHTS": str(tmp_path / "teacher.pth")}))
    assert log.text.count("The teacher has 8 classes and the student 5: their features are compared") == 2
    losses = step(model, batch())
    assert all(losses[f"loss_{method.lower()}"] > 0 for method in methods)


def test_anchors_are_the_same_only_in_retinanets_that_pad_alike():
    model = build(small_cfg("retinanet_bckd_r101_r50"))
    parts = vars(model) | model._modules
    model.check_comparable(parts, model.teacher, "BCKD")
    model.teacher.backbone._size_divisibility = 128
    with pytest.raises(ConfigError, match="classes of anchors, but the teacher is a Linear"):
        model.check_comparable(parts, nn.Linear(1, 1), "BCKD")
    with pytest.raises(ConfigError, match=r"differ in their padding \(32, .*\) and \(128, "):
        model.check_comparable(parts, model.teacher, "BCKD")


def test_sigmoid_classes_of_an_rcnn_have_no_background_column():
    cfg = small_cfg(
        "dkd_r101_r18",
        **{
            "DISTILL.METHODS": ["BCKD"],
            "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True,
            "TEACHER.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True,
        },
    )
    model = build(cfg)
    loss = step(model, batch())["loss_bckd"]
    loss.backward()
    gradient = model.roi_heads.box_predictor.cls_score.weight.grad
    assert gradient[:-1].abs().sum() > 0 and gradient[-1].abs().sum() == 0
