"""What the feature methods put between the two networks: regressors, connectors, margins, fusions; any two shapes."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2distill.common.distillers import DISTILLERS, FeatureDistiller, at_loss, hcl_loss, ofd_loss, ofd_margin, vid_loss
from d2distill.common.outputs import Batch, Outputs
from tests.common.distillers import single_method
from tests.goldens.fill import array

FEATURE_METHODS = ["FitNet", "AT", "NST", "KDSVD", "OFD", "VID", "SP", "ReviewKD"]
METHODS = [*FEATURE_METHODS, "PKT", "RKD"]

# Shapes of the student's and of the teacher's maps, the stem first.
PAIRS = {
    "equal": ([(3, 8, 8), (4, 8, 8), (6, 4, 4), (8, 2, 2)], [(5, 8, 8), (6, 8, 8), (7, 4, 4), (9, 2, 2)]),
    "deeper teacher": ([(3, 8, 8), (4, 8, 8), (6, 4, 4)], [(5, 16, 16), (6, 8, 8), (7, 8, 8), (9, 4, 4), (9, 2, 2)]),
    "deeper student": ([(3, 9, 9), (4, 9, 9), (6, 5, 5), (7, 3, 3), (8, 2, 2)], [(5, 8, 8), (6, 8, 8), (7, 4, 4)]),
    "not square": ([(3, 9, 14), (4, 9, 14), (6, 5, 7), (8, 3, 4)], [(5, 6, 20), (6, 6, 20), (7, 3, 10), (9, 2, 5)]),
    "tokens": ([(3, 16, 16), (4, 8, 8), (6, 4, 4), (8, 2, 2)], [(12, 7, 7)] * 5),
    "tokens learn": ([(12, 7, 7)] * 5, [(3, 16, 16), (4, 8, 8), (6, 4, 4), (8, 2, 2)]),
    "1x1": ([(3, 4, 4), (4, 2, 2), (6, 1, 1)], [(5, 4, 4), (6, 2, 2), (7, 1, 1)]),
}


def outputs(seed, shapes, batch=3, pooled=None, preacts=True, trainable=False):
    def tensor(seed, *shape):
        return array(seed, batch, *shape).requires_grad_(trainable)

    maps = [tensor(seed + i, *shape) for i, shape in enumerate(shapes)]
    # Maps of their own, so that each part's gradient shows whether it was read.
    feats = [m.detach().relu().requires_grad_(trainable) for m in maps]
    return Outputs(None, feats, maps if preacts else None, tensor(seed + 30, pooled) if pooled else None)


def pair(name, batch=3):
    """Student and teacher."""
    student, teacher = PAIRS[name]
    return outputs(1, student, batch, pooled=10, trainable=True), outputs(60, teacher, batch, pooled=12)


def without_sizes(info):
    return replace(
        info,
        feats=tuple(shape[:1] for shape in info.feats),
        preacts=info.preacts and tuple(shape[:1] for shape in info.preacts),
    )


def norms(info):
    return [nn.BatchNorm2d(shape[0]) for shape in info.feats[1:]]


def build(name, student, teacher, sizes=True, **settings):
    infos = [network.info() if sizes else without_sizes(network.info()) for network in (student, teacher)]
    infos[1] = replace(infos[1], module=SimpleNamespace(bn_before_relu=norms(infos[1])))
    return single_method.build(name, *infos, **settings)


class Network(nn.Module):
    """Gives the same outputs for any images."""

    def __init__(self, given):
        super().__init__()
        self.given = given

    def outputs(self, images):
        return self.given


def call(method, student, teacher):
    """The method's term, once the teacher has provided what it asks for."""
    extras = {name: provide(Network(teacher), None) for name, provide in method.teacher_extras.items()}
    return method(student, replace(teacher, extras=extras), Batch())


def step(method, student, teacher):
    """One backward pass. The term, once it is certain that its gradients reach the student and the method."""
    value = call(method, student, teacher)
    value.backward()
    assert value.shape == () and value.isfinite()
    inputs = [*student.feats, *(student.preacts or []), *([] if student.pooled is None else [student.pooled])]
    grads = [x.grad for x in inputs if x.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    return value


@pytest.mark.parametrize(
    ("shapes", "sizes"), [*[(name, True) for name in PAIRS], ("deeper teacher", False), ("not square", False)]
)
@pytest.mark.parametrize("name", METHODS)
def test_any_pair(name, shapes, sizes):
    """Also where the sizes of the maps are unknown when the method is built, as in detection."""
    student, teacher = pair(shapes)
    assert step(build(name, student, teacher, sizes), student, teacher) > 0


@pytest.mark.parametrize("sides", [("student",), ("teacher",), ()], ids="-".join)
@pytest.mark.parametrize("name", ["OFD", "ReviewKD"])
def test_networks_without_preacts(name, sides):
    student = outputs(1, PAIRS["equal"][0], preacts="student" in sides, trainable=True)
    teacher = outputs(60, PAIRS["equal"][1], preacts="teacher" in sides)
    step(build(name, student, teacher), student, teacher)


@pytest.mark.parametrize("name", ["FitNet", "OFD", "ReviewKD"])
def test_batch_norms_of_a_single_value(name):
    student, teacher = pair("1x1", batch=1)
    method = build(name, student, teacher)
    assert step(method, student, teacher) > 0
    assert all(b.isfinite().all() for b in method.buffers())


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_a_feature_pyramid(name):
    """Five levels alike, no pooled vector, sizes that vary."""
    shapes = [(8, 12, 20), (8, 6, 10), (8, 3, 5), (8, 2, 3), (8, 1, 2)]
    student, teacher = outputs(1, shapes, preacts=False, trainable=True), outputs(60, shapes, preacts=False)
    with_stem = {} if name in ("FitNet", "SP", "OFD") else {"FIRST": 0}
    method = build(name, student, teacher, sizes=False, **with_stem)
    step(method, student, teacher)
    if with_stem:
        assert all(feat.grad.any() for feat in student.feats) and len(method.select_pairs(student, teacher)[0]) == 5


@pytest.mark.parametrize("name", [n for n in FEATURE_METHODS if issubclass(DISTILLERS.get(n), FeatureDistiller)])
def test_the_stem_takes_no_part_and_stages_are_paired_from_the_deep_end(name):
    student, teacher = pair("deeper teacher")
    method = build(name, student, teacher)
    value = step(method, student, teacher)
    read, unread = (student.preacts, student.feats)[:: 1 if name == "OFD" else -1]
    assert read[0].grad is None and all(feat.grad.any() for feat in read[1:])
    assert all(feat.grad is None for feat in unread)
    for part in (teacher.feats, teacher.preacts):  # the stem and the two stages the student has no partner for
        part[:3] = [torch.full_like(feat, torch.nan) for feat in part[:3]]
    assert torch.equal(call(method, student, teacher), value)
    with pytest.raises(ValueError, match="FIRST is 3, which leaves none of the student's 3 maps"):
        build(name, student, teacher, FIRST=3)


def test_attention_may_be_paired_from_the_shallow_end():
    student, teacher = pair("deeper teacher")
    value = call(build("AT", student, teacher, ALIGN="shallow"), student, teacher)
    assert torch.equal(value, at_loss(student.feats[1:], teacher.feats[1:3]))
    with pytest.raises(ValueError, match='ALIGN is "deep" or "shallow", but was given \'middle\''):
        build("AT", student, teacher, ALIGN="middle")


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "kernel"),
    [
        ((4, 8, 8), (6, 8, 8), nn.Conv2d, (1, 1)),
        ((4, 8, 8), (6, 4, 4), nn.Conv2d, (3, 3)),
        ((4, 4, 4), (6, 8, 8), nn.ConvTranspose2d, (4, 4)),
        ((4, 9, 8), (6, 7, 7), nn.Conv2d, (3, 2)),
        ((4, 8, 8), (6, 4, 8), nn.Conv2d, (5, 1)),
        ((4, 12, 12), (6, 4, 4), nn.Conv2d, (9, 9)),
        ((4, 5, 5), (6, 8, 8), nn.Conv2d, (1, 1)),
        ((4, 8, 4), (6, 4, 8), nn.Conv2d, (1, 1)),
        ((4,), (6,), nn.Conv2d, (1, 1)),
    ],
)
def test_hint_regressor(student, teacher, kind, kernel):
    shapes = [shape if len(shape) == 3 else (*shape, 5, 7) for shape in (student, teacher)]
    feats = [array(i, 2, *shape) for i, shape in enumerate(shapes)]
    sides = [Outputs(feats=[feat] * 3) for feat in feats]
    method = build("FitNet", *sides, sizes=len(student) == 3)
    conv = method.regressor.conv
    assert type(conv) is kind and conv.kernel_size == kernel and conv.bias is not None
    out = method.regressor(feats[0], feats[1].shape[2:])
    assert out.shape == feats[1].shape and out.min() == 0
    torch.testing.assert_close(call(method, *sides), F.mse_loss(out, feats[1]))
    with pytest.raises(ValueError, match="HINT_LAYER is 3, but the student has 3 maps"):
        build("FitNet", *sides, HINT_LAYER=3)


def test_margins_come_from_the_teachers_batch_norms():
    """Of which there may be fewer than stages, from the deep end, and without parameters: N(0, 1)."""
    student, teacher = pair("equal")
    plain, last = nn.BatchNorm2d(7, affine=False), nn.BatchNorm2d(9)
    nn.init.constant_(last.bias, -0.5)

    def build(*norms):
        module = nn.Identity()
        module.bn_before_relu = norms
        return single_method.build("OFD", student, replace(teacher.info(), module=module))

    method = build(plain, last)
    margins = [torch.full((7,), -math.sqrt(2 / math.pi)), ofd_margin(torch.ones(9), torch.full((9,), -0.5))]
    torch.testing.assert_close(method.margins, margins)
    assert not {plain, last} & set(method.modules())
    connected = [conv_bn(x) for conv_bn, x in zip(method.connectors, student.preacts[2:], strict=True)]
    torch.testing.assert_close(call(method, student, teacher), ofd_loss(connected, teacher.preacts[2:], margins))
    with pytest.raises(ValueError, match=r"bn_before_relu.*, but this teacher names none"):
        build()
    with pytest.raises(ValueError, match="batch norm 1 has 7 channels, but its map 9"):
        build(plain, plain)


def test_the_mean_is_regressed_by_three_convolutions():
    student, teacher = pair("equal")
    regressor = build("VID", student, teacher).regressors[0]
    x, weights = student.feats[1], list(regressor.parameters())
    assert [tuple(weight.shape) for weight in weights] == [(6, 4, 1, 1), (6, 6, 1, 1), (6, 6, 1, 1)]
    expected = F.conv2d(F.conv2d(F.conv2d(x, weights[0]).relu(), weights[1]).relu(), weights[2])
    torch.testing.assert_close(regressor(x), expected)


@pytest.mark.parametrize(
    ("name", "parts", "deviation"),
    [
        ("ReviewKD", ["fusions.0.reduce.0", "fusions.0.expand.0"], lambda w: w[0].numel() ** -0.5),
        ("OFD", ["connectors.0.0"], lambda w: (2 / len(w)) ** 0.5),
    ],
)
def test_connectors_begin_as_published(name, parts, deviation):
    shapes = [(3, 4, 4), (60, 4, 4), (90, 2, 2)]
    student, teacher = outputs(1, shapes), outputs(60, [*shapes[:1], (120, 4, 4), (90, 2, 2)])
    method = build(name, student, teacher)
    for part in parts:
        weight = method.get_parameter(f"{part}.weight")
        assert weight.std().item() == pytest.approx(deviation(weight), rel=0.05)


def test_variances_are_learned_and_saved():
    student, teacher = pair("equal")
    method = build("VID", student, teacher)
    scales = dict(method.named_parameters())
    assert [tuple(scales[f"log_scales.{i}"].shape) for i in range(3)] == [(6,), (7,), (9,)]
    assert {f"log_scales.{i}" for i in range(3)} <= set(method.state_dict())
    variances = [F.softplus(scale) + 1e-5 for scale in method.log_scales]
    torch.testing.assert_close(torch.cat(variances), torch.full((22,), 5.0))
    begun = build("VID", student, teacher, INIT_VAR=2.0, EPS=0.5).log_scales  # EPS is part of the variance
    assert all(torch.allclose(F.softplus(scale) + 0.5, torch.tensor(2.0)) for scale in begun)
    value = step(method, student, teacher)
    assert all(scale.grad.abs().min() > 0 for scale in method.log_scales)
    terms = zip(method.regressors, student.feats[1:], teacher.feats[1:], variances, strict=True)
    assert value.item() == pytest.approx(sum(vid_loss(r(s), t, v).item() for r, s, t, v in terms), rel=1e-6)
    with pytest.raises(ValueError, match="INIT_VAR"):
        build("VID", student, teacher, INIT_VAR=1e-6)


def test_fusion_from_deep_to_shallow():
    """The fused maps step by step, with functions in place of the module."""
    student, teacher = outputs(1, PAIRS["equal"][0], pooled=10), outputs(60, PAIRS["tokens"][1], pooled=12)
    method = build("ReviewKD", student, teacher)
    maps = [*student.feats[1:], student.pooled.view(3, 10, 1, 1)]
    targets = [*teacher.preacts[-3:], teacher.pooled.view(3, 12, 1, 1)]
    state = {name: value.clone() for name, value in method.state_dict().items()}
    assert state["fusions.0.reduce.0.weight"].shape[0] == 10  # the deepest entry's channels, below 512
    assert "fusions.3.attention.0.weight" not in state and "fusions.2.attention.0.bias" in state

    def conv_bn(x, prefix, padding=0):
        x = F.conv2d(x, state[f"{prefix}.0.weight"], padding=padding)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt()

    fused, deeper = [None] * 4, None
    for i in (3, 2, 1, 0):
        x = conv_bn(maps[i], f"fusions.{i}.reduce")
        if deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:])
            weight = state[f"fusions.{i}.attention.0.weight"]
            z = F.conv2d(torch.cat([x, deeper], 1), weight, state[f"fusions.{i}.attention.0.bias"]).sigmoid()
            x = x * z[:, 0][:, None] + deeper * z[:, 1][:, None]
        deeper = F.interpolate(x, targets[i].shape[2:])
        fused[i] = conv_bn(deeper, f"fusions.{i}.expand", padding=1)
    value = call(method, student, teacher)
    assert value.item() == pytest.approx(hcl_loss(fused, targets).item(), rel=1e-5)


def test_fusion_settings():
    student, teacher = pair("equal")
    step(build("ReviewKD", student, teacher, STUDENT_PREACT=True), student, teacher)
    assert student.feats[1].grad is None and student.preacts[1].grad is not None
    with pytest.raises(ValueError, match="STUDENT_PREACT is set, but the student has no"):
        build("ReviewKD", replace(student, preacts=None), teacher, STUDENT_PREACT=True)
    wide = replace(student, pooled=torch.zeros(3, 600))
    assert len(build("ReviewKD", wide, replace(teacher, pooled=None)).fusions) == 3
    method = build("ReviewKD", wide, teacher)
    assert len(method.fusions) == 4 and method.fusions[-1].reduce[0].weight.shape[:2] == (512, 600)


def test_one_stage_has_no_neighbor():
    one = outputs(1, PAIRS["equal"][0][:2])
    with pytest.raises(ValueError, match="two or more"):
        build("KDSVD", one, one)
