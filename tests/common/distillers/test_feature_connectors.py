"""What the feature methods put between the two networks: regressors, connectors, margins, fusions; any two shapes."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2distill.common.config import CfgNode, add_distill_defaults
from d2distill.common.distillers import DISTILLERS, Context, FeatureDistiller, hcl_loss, ofd_margin, vid_loss
from d2distill.common.outputs import Outputs
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


def outputs(seed, shapes, batch=3, pooled=None, preacts=True):
    feats = [array(seed + i, batch, *shape) for i, shape in enumerate(shapes)]
    return Outputs(
        logits=array(seed + 20, batch, 5),
        feats=[feat.relu() for feat in feats],
        preacts=feats if preacts else None,
        pooled=array(seed + 30, batch, pooled) if pooled else None,
    )


def trainable(result):
    for part in ("feats", "preacts"):
        if getattr(result, part) is not None:
            setattr(result, part, [feat.detach().clone().requires_grad_() for feat in getattr(result, part)])
    if result.pooled is not None:
        result.pooled.requires_grad_()
    return result


def build(name, student, teacher, sizes=True, **settings):
    cfg = CfgNode()
    add_distill_defaults(cfg)
    node = cfg.DISTILL[name.upper()]
    for key, value in settings.items():
        assert key in node
        node[key] = value
    specs = student.spec(), teacher.spec()
    if not sizes:
        specs = [
            replace(
                spec,
                feats=tuple(shape[:1] for shape in spec.feats),
                preacts=spec.preacts and tuple(shape[:1] for shape in spec.preacts),
            )
            for spec in specs
        ]
    norms = tuple(nn.BatchNorm2d(shape[0]) for shape in specs[1].feats[1:])
    return DISTILLERS.get(name)(node, specs[0], replace(specs[1], bn_before_relu=norms))


def step(method, student, teacher):
    """One backward pass. The loss, once it is certain that it reaches all it should."""
    (name, value), *rest = method(student, teacher, torch.arange(len(student.logits)), Context(time=1.0)).items()
    assert name == f"loss_{method.name.lower()}" and value.shape == () and not rest
    value.backward()
    assert value.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    inputs = [*student.feats, *(student.preacts or []), *([] if student.pooled is None else [student.pooled])]
    grads = [x.grad for x in inputs if x.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)
    return value


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", METHODS)
def test_any_pair(name, pair):
    student = trainable(outputs(1, PAIRS[pair][0], pooled=10))
    teacher = outputs(60, PAIRS[pair][1], pooled=12)
    method = build(name, student, teacher)
    step(method, student, teacher)
    assert not any(norm.startswith("margin") for norm in method.state_dict())


@pytest.mark.parametrize("sides", [("student",), ("teacher",), ()], ids="-".join)
@pytest.mark.parametrize("name", ["OFD", "ReviewKD"])
def test_networks_without_preacts(name, sides):
    student = trainable(outputs(1, PAIRS["equal"][0], preacts="student" in sides))
    teacher = outputs(60, PAIRS["equal"][1], preacts="teacher" in sides)
    step(build(name, student, teacher), student, teacher)


@pytest.mark.parametrize("pair", ["deeper teacher", "not square"])
@pytest.mark.parametrize("name", METHODS)
def test_unknown_sizes(name, pair):
    student = trainable(outputs(1, PAIRS[pair][0], pooled=10))
    teacher = outputs(60, PAIRS[pair][1], pooled=12)
    step(build(name, student, teacher, sizes=False), student, teacher)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_small_batches(name, batch):
    student = trainable(outputs(1, PAIRS["1x1"][0], batch, pooled=10))
    teacher = outputs(60, PAIRS["1x1"][1], batch, pooled=12)
    method = build(name, student, teacher)
    value = step(method, student, teacher)
    assert batch or value == 0
    if name not in ("SP", "PKT", "RKD") and batch:  # nothing to compare one sample with
        assert value != 0
    assert all(b.isfinite().all() for b in method.buffers())


@pytest.mark.parametrize("name", METHODS)
def test_bf16_autocast_with_large_maps(name):
    student, teacher = outputs(1, PAIRS["not square"][0], pooled=10), outputs(60, PAIRS["not square"][1], pooled=12)
    for result in (student, teacher):
        result.feats, result.preacts, result.pooled = (
            [1e4 * x for x in result.feats], [1e4 * x for x in result.preacts], 1e4 * result.pooled
        )  # fmt: skip
    student = trainable(student)
    method = build(name, student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert step(method, student, teacher).dtype == torch.float32


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_without_pooled_and_from_entry_zero(name):
    """A feature pyramid: five levels alike, no pooled vector, sizes that vary."""
    shapes = [(8, 12, 20), (8, 6, 10), (8, 3, 5), (8, 2, 3), (8, 1, 2)]
    student, teacher = trainable(outputs(1, shapes, preacts=False)), outputs(60, shapes, preacts=False)
    settings = {} if name in ("FitNet", "SP", "OFD") else {"FIRST": 0}
    method = build(name, student, teacher, sizes=False, **settings)
    step(method, student, teacher)
    if settings:
        assert all(feat.grad is not None and feat.grad.abs().sum() > 0 for feat in student.feats)
        assert len(method.select_pairs(student, teacher)[0]) == 5


@pytest.mark.parametrize("name", [n for n in FEATURE_METHODS if issubclass(DISTILLERS.get(n), FeatureDistiller)])
def test_the_stem_takes_no_part_and_stages_are_paired_from_the_deep_end(name):
    student, teacher = trainable(outputs(1, PAIRS["deeper teacher"][0])), outputs(60, PAIRS["deeper teacher"][1])
    method = build(name, student, teacher)
    value = step(method, student, teacher)
    feats = student.preacts if name == "OFD" else student.feats
    assert feats[0].grad is None and all(feat.grad.abs().sum() > 0 for feat in feats[1:])
    for part in (teacher.feats, teacher.preacts):  # the stem and the two stages the student has no partner for
        part[:3] = [torch.full_like(feat, torch.nan) for feat in part[:3]]
    assert torch.equal(method(student, teacher, None, Context(time=1.0))[f"loss_{name.lower()}"], value)
    with pytest.raises(ValueError, match="FIRST is 3, which leaves none of the student's 3 maps"):
        build(name, student, teacher, FIRST=3)


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
    spec = [Outputs(logits=torch.zeros(2, 5), feats=[feat] * 3) for feat in feats]
    method = build("FitNet", *spec, sizes=len(student) == 3)
    conv = method.regressor.conv
    assert type(conv) is kind and conv.kernel_size == kernel and conv.bias is not None
    out = method.regressor(feats[0], feats[1].shape[2:])
    assert out.shape == feats[1].shape and out.min() == 0
    value = method.losses(*spec, None, Context())["loss_fitnet"]
    method.regressor.bn.reset_running_stats()
    assert value.item() == pytest.approx(F.mse_loss(method.regressor(feats[0], feats[1].shape[2:]), feats[1]).item())
    with pytest.raises(ValueError, match="HINT_LAYER is 3, but the student has 3 maps"):
        build("FitNet", *spec, HINT_LAYER=3)


def test_margins_come_from_the_teachers_batch_norms():
    student, teacher = outputs(1, PAIRS["equal"][0]), outputs(60, PAIRS["equal"][1])
    norms = [nn.BatchNorm2d(shape[0]) for shape in PAIRS["equal"][1][1:]]
    nn.init.constant_(norms[-1].bias, -0.5)
    plain = nn.BatchNorm2d(7, affine=False)
    node = build("OFD", student, teacher).cfg
    spec = replace(teacher.spec(), bn_before_relu=(plain, norms[-1]))
    method = DISTILLERS.get("OFD")(node, student.spec(), spec)
    half_normal = -math.sqrt(2 / math.pi)
    assert [m.shape for m in method.margins] == [(7,), (9,)] and len(method.connectors) == 2
    torch.testing.assert_close(method.margins[0], torch.full((7,), half_normal))
    torch.testing.assert_close(method.margins[1], ofd_margin(torch.ones(9), torch.full((9,), -0.5)))
    assert all(norm is not module for norm in norms for module in method.modules())
    assert method.losses(student, teacher, None, Context())["loss_ofd"] > 0
    with pytest.raises(ValueError, match=r"OutputSpec.bn_before_relu\), but this teacher names none"):
        DISTILLERS.get("OFD")(node, student.spec(), replace(spec, bn_before_relu=None))
    with pytest.raises(ValueError, match="batch norm 1 has 7 channels, but its map 9"):
        DISTILLERS.get("OFD")(node, student.spec(), replace(spec, bn_before_relu=(plain, plain)))


def test_ofd_alone_has_its_teacher_normalise_by_the_batch():
    assert [name for name, method in DISTILLERS if method.teacher_batch_statistics] == ["OFD"]


def test_the_mean_is_regressed_by_three_convolutions():
    student, teacher = outputs(1, PAIRS["equal"][0]), outputs(60, PAIRS["equal"][1])
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
    student, teacher = trainable(outputs(1, PAIRS["equal"][0])), outputs(60, PAIRS["equal"][1])
    method = build("VID", student, teacher)
    scales = dict(method.named_parameters())
    assert [tuple(scales[f"log_scales.{i}"].shape) for i in range(3)] == [(6,), (7,), (9,)]
    assert {f"log_scales.{i}" for i in range(3)} <= set(method.state_dict())
    variances = [F.softplus(scale) + 1e-5 for scale in method.log_scales]
    assert all(torch.allclose(v, torch.tensor(5.0)) for v in variances)
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
    value = method.losses(student, teacher, None, Context())["loss_reviewkd"]
    assert value.item() == pytest.approx(hcl_loss(fused, targets).item(), rel=1e-5)


def test_fusion_settings():
    student, teacher = trainable(outputs(1, PAIRS["equal"][0])), outputs(60, PAIRS["equal"][1])
    step(build("ReviewKD", student, teacher, STUDENT_PREACT=True), student, teacher)
    assert student.feats[1].grad is None and student.preacts[1].grad is not None
    with pytest.raises(ValueError, match="STUDENT_PREACT is set, but the student has no"):
        build("ReviewKD", replace(student, preacts=None), teacher, STUDENT_PREACT=True)
    wide = replace(student, pooled=torch.zeros(3, 600))
    assert len(build("ReviewKD", wide, teacher).fusions) == 3  # the teacher has no pooled vector
    method = build("ReviewKD", wide, replace(teacher, pooled=torch.zeros(3, 700)))
    assert len(method.fusions) == 4 and method.fusions[-1].reduce[0].weight.shape[:2] == (512, 600)


def test_one_stage_has_no_neighbour():
    one = outputs(1, PAIRS["equal"][0][:2])
    with pytest.raises(ValueError, match="two or more"):
        build("KDSVD", one, one)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("FitNet", {"WEIGHT": 100.0, "HINT_LAYER": 2}),
        ("AT", {"WEIGHT": 1000.0, "P": 2.0, "ALIGN": "deep", "FIRST": 1}),
        ("NST", {"WEIGHT": 50.0, "FIRST": 1}),
        ("PKT", {"WEIGHT": 30000.0, "EPS": 1e-7}),
        ("KDSVD", {"WEIGHT": 1.0, "K": 1, "FIRST": 1}),
        ("OFD", {"WEIGHT": 1e-3, "FIRST": 1}),
        ("VID", {"WEIGHT": 1.0, "EPS": 1e-5, "INIT_VAR": 5.0, "FIRST": 1}),
        ("SP", {"WEIGHT": 3000.0}),
        ("ReviewKD", {"WEIGHT": 5.0, "WARMUP": 20, "STUDENT_PREACT": False, "FIRST": 1}),
        (
            "RKD",
            {"WEIGHT": 1.0, "DISTANCE_WEIGHT": 25.0, "ANGLE_WEIGHT": 50.0, "EPS": 1e-12, "SQUARED": False},
        ),
    ],
)
def test_published_defaults(name, settings):
    cfg = CfgNode()
    add_distill_defaults(cfg)
    assert cfg.DISTILL[name.upper()] == {"WARMUP": 0, "TEACHER": 0, **settings}
