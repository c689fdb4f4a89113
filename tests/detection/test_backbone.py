"""MobileNetV2 as Detectron2 backbones: shapes, names, what is trained."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import nn
from torchvision.models import mobilenet_v2

from d2distill.common.errors import ConfigError
from d2distill.detection.backbone import MobileNetV2
from d2distill.detection.weight_names import nested_mobilenetv2_names
from tests.detection.stock_detectors import FPN, KEYS, detector_cfg, drawn


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("build_mobilenetv2_fpn_backbone", {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}),
        ("build_retinanet_mobilenetv2_fpn_backbone", {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}),
    ],
)
def test_levels(name, levels):
    backbone = build_backbone(detector_cfg(name))
    assert {level: shape.stride for level, shape in backbone.output_shape().items()} == levels
    assert backbone.size_divisibility == 32
    maps = backbone(torch.rand(1, 3, 64, 96))
    assert {level: tuple(x.shape) for level, x in maps.items()} == {
        level: (1, 16, -(-64 // stride), -(-96 // stride)) for level, stride in levels.items()
    }
    sum(x.sum() for x in maps.values()).backward()
    # FREEZE_AT is 2 by default, and freezes nothing here.
    assert all(p.grad is not None for p in backbone.parameters())


def test_features_are_torchvisions():
    theirs = drawn(mobilenet_v2(), 0).eval()
    ours = MobileNetV2().eval()
    state = {n: t for n, t in theirs.state_dict().items() if n in ours.state_dict()}
    ours.load_state_dict(state)
    images = torch.rand(1, 3, 64, 64)
    maps, x, strides = ours(images), images, {}
    for index, block in enumerate(theirs.features[:-1]):
        x = block(x)
        for name, last in {"res2": 3, "res3": 6, "res4": 13, "res5": 17}.items():
            if index == last:
                torch.testing.assert_close(maps[name], x, atol=1e-5, rtol=1e-5)
                strides[name] = 64 // x.shape[-1]
    assert strides == {n: s.stride for n, s in ours.output_shape().items()}
    assert [s.channels for s in ours.output_shape().values()] == [24, 32, 96, 320]
    assert ours.size_divisibility == 32


@pytest.mark.parametrize(("norm", "kind"), [("FrozenBN", FrozenBatchNorm2d), ("BN", nn.BatchNorm2d)])
def test_norms(norm, kind):
    backbone = build_backbone(detector_cfg("build_mobilenetv2_fpn_backbone", MODEL__RESNETS__NORM=norm))
    assert sum(type(m) is kind or isinstance(m, kind) for m in backbone.modules()) == 51
    assert all(p.requires_grad for p in backbone.parameters())
    assert len(list(MobileNetV2(norm).parameters())) == (51 if norm == "FrozenBN" else 51 * 3)


@pytest.mark.parametrize("norm", ["GN", ""])
def test_other_norms_are_refused(norm):
    with pytest.raises(ConfigError, match=r"MODEL\.RESNETS\.NORM"):
        MobileNetV2(norm)


@pytest.mark.parametrize(
    ("name", "public"),
    [("build_mobilenetv2_fpn_backbone", "mobilenetv2_fpn"), ("build_resnet_fpn_backbone", "resnet18_fpn")],
)
def test_names_and_shapes_are_the_public_ones(name, public):
    backbone = build_backbone(detector_cfg(name, MODEL__FPN__OUT_CHANNELS=256))
    own = {f"backbone.{n}": list(t.shape) for n, t in backbone.state_dict().items()}
    theirs = {n: torch.empty(shape, device="meta") for n, shape in KEYS[public].items()}
    assert own == {n: list(t.shape) for n, t in nested_mobilenetv2_names(theirs).items()}
    assert FPN == detector_cfg(name).MODEL.FPN.IN_FEATURES
