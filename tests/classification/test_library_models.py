"""Models of timm and torchvision: same networks, same names, and outputs to distil from."""

import builtins
import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn

from d2distill.classification.config import get_cfg
from d2distill.classification.models import build_model
from d2distill.classification.models.library import last_classifier, tokens_to_map
from d2distill.classification.networks import network_info
from d2distill.classification.solver import build_optimizer

# Name, image size, image_size option, (channels, side) of the maps, D of the pooled vector.
QUICK = [
    ("timm:resnet18", 64, None, [(64, 32), (64, 16), (128, 8), (256, 4), (512, 2)], 512),
    ("timm:mobilenetv3_small_050", 64, None, [(16, 32), (8, 16), (16, 8), (24, 4), (288, 2)], 1024),
    ("timm:vit_tiny_patch16_224", 64, 64, [(192, 4)] * 5, 192),
    ("timm:deit_tiny_distilled_patch16_224", 64, 64, [(192, 4)] * 5, 192),
    ("timm:convnext_atto", 64, None, [(40, 16), (40, 16), (80, 8), (160, 4), (320, 2)], 320),
    ("torchvision:resnet18", 64, None, [(64, 32), (64, 16), (128, 8), (256, 4), (512, 2)], 512),
    ("torchvision:mobilenet_v2", 64, None, [(16, 32), (24, 16), (32, 8), (96, 4), (1280, 2)], 1280),
    ("torchvision:shufflenet_v2_x0_5", 64, None, [(24, 32), (24, 16), (48, 8), (96, 4), (1024, 2)], 1024),
    ("torchvision:squeezenet1_1", 64, None, [(64, 31), (128, 15), (256, 7), (512, 3)], 512),
]
SLOW = [
    ("timm:swin_tiny_patch4_window7_224", 64, 64, [(96, 16), (96, 16), (192, 8), (384, 4), (768, 2)], 768),
    ("timm:crossvit_tiny_240", 240, None, [(96, 20)] * 3 + [(192, 14)] * 3, 288),
    ("torchvision:densenet121", 64, None, [(64, 32), (256, 16), (512, 8), (1024, 4), (1024, 2)], 1024),
    ("torchvision:convnext_tiny", 64, None, [(96, 16), (96, 16), (192, 8), (384, 4), (768, 2)], 768),
    ("torchvision:swin_t", 64, None, [(96, 16), (96, 16), (192, 8), (384, 4), (768, 2)], 768),
    ("torchvision:vit_b_32", 64, 64, [(768, 2)] * 5, 768),
    ("torchvision:inception_v3", 96, None, [(64, 45), (192, 20), (288, 9), (768, 4), (2048, 1)], 2048),
    ("torchvision:maxvit_t", 224, 224, [(64, 112), (64, 56), (128, 28), (256, 14), (512, 7)], 512),
]
# Heads on two class tokens, on tokens of two widths, and in front of the pooling.
NO_SINGLE_LAYER = ("timm:deit_tiny_distilled_patch16_224", "timm:crossvit_tiny_240", "torchvision:squeezenet1_1")


def plain(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    """The library's own model."""
    library, _, name = name.partition(":")
    if library == "timm":
        return timm.create_model(name, num_classes=num_classes, **({"img_size": image_size} if image_size else {}))
    options = {"input_size": (224, 224)} if name == "maxvit_t" else {"image_size": image_size} if image_size else {}
    if name == "inception_v3":
        options = {"aux_logits": False, "init_weights": True}
    return torchvision.models.get_model(name, num_classes=num_classes, **options)


@pytest.mark.parametrize(
    ("name", "size", "image_size", "maps", "width"),
    [pytest.param(*row, id=row[0]) for row in QUICK]
    + [pytest.param(*row, id=row[0], marks=pytest.mark.slow) for row in SLOW],
)
def test_library_model(name, size, image_size, maps, width):
    torch.manual_seed(0)
    reference = plain(name, 7, image_size).eval()
    model = build_model(name, 7, image_size=image_size).eval()
    assert model.training is False and isinstance(model, type(reference))
    # The library's own names: its checkpoints load and ours load into it.
    model.load_state_dict(reference.state_dict(), strict=True)
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in reference.named_parameters()]

    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = reference(images)
        assert torch.equal(model(images), expected)
    outputs = model.outputs(images)
    assert torch.equal(outputs.logits, expected)
    assert [tuple(feat.shape) for feat in outputs.feats] == [(2, c, side, side) for c, side in maps]
    assert outputs.pooled.shape == (2, width)
    assert outputs.preacts is None and model.bn_before_relu is None
    assert not any(module._forward_hooks for module in model.modules())
    if name in NO_SINGLE_LAYER:
        assert model.classifier_layer is None
    else:
        torch.testing.assert_close(model.classifier_layer(outputs.pooled), outputs.logits)
    # Every tensor handed out takes part: one overwritten in place would fail here.
    sum(t.square().mean() for t in (outputs.logits, outputs.pooled, *outputs.feats)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "torchvision:shufflenet_v2_x0_5"])
def test_copies(name):
    model = build_model(name, 7, image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin.outputs(images).logits, model(images))


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2.lvd142m", "resnet18", "mobilenetv3_small_050"])
def test_teachers_without_classes(name):
    """0 classes is timm's word for no classifier; what the network then gives is the pooled vector."""
    model = build_model(f"timm:{name}", 0, image_size=56).eval()
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        outputs = model.outputs(images)
        assert torch.equal(outputs.pooled, model(images)) and outputs.pooled.shape == (2, model.head_hidden_size)
    assert outputs.logits is None and model.classifier_layer is None
    assert network_info(model, 56).num_classes is None and len(outputs.feats) == 5
    if "vit" in name:
        assert [tuple(feat.shape) for feat in outputs.feats] == [(2, 384, 4, 4)] * 5


def test_two_heads_share_one_pooled_vector():
    model = build_model("timm:deit_tiny_distilled_patch16_224", 7, image_size=32).eval()
    assert model.classifiers == ["head", "head_dist"]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.forward_features(images)
        torch.testing.assert_close(model.outputs(images).pooled, (tokens[:, 0] + tokens[:, 1]) / 2)


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "torchvision:vit_b_32"])
def test_tokens_become_maps(name):
    """Position (i, j) of a map is the token of image patch (i, j): change one patch and see where the stem changes."""
    patch = int(name.split("patch")[1][:2]) if "patch" in name else 32
    model = build_model(name, 7, image_size=4 * patch).eval()
    images = torch.zeros(1, 3, 4 * patch, 4 * patch)
    changed = images.clone()
    changed[:, :, patch : 2 * patch, 3 * patch :] = 1
    with torch.no_grad():
        before, after = model.outputs(images), model.outputs(changed)
    difference = (before.feats[0] - after.feats[0]).abs().sum(1)[0]
    assert difference[1, 3] > 0 and difference.count_nonzero() == 1
    if name == "timm:vit_tiny_patch16_224":
        with torch.no_grad():
            blocks = model.forward_intermediates(images, indices=[2, 5, 8, 11], intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(before.feats[1:], blocks, strict=True))


def test_class_tokens_come_first_and_are_dropped():
    tokens = torch.arange(8).view(1, 8, 1).expand(2, 8, 3)
    maps = tokens_to_map(tokens, 2, 3)
    assert maps.shape == (2, 3, 2, 3) and maps[1, 2].tolist() == [[2, 3, 4], [5, 6, 7]]


def test_the_classifier_is_the_last_linear_layer_of_its_width():
    layers = {"conv": nn.Conv2d(3, 7, 1), "first": nn.Linear(3, 7), "last": nn.Linear(7, 7), "map": nn.Conv2d(7, 7, 1)}
    assert last_classifier(nn.ModuleDict(layers), 7) == "last"
    assert last_classifier(nn.ModuleDict({"conv": layers["conv"], "other": nn.Linear(7, 8)}), 7) == "conv"


def test_a_classifier_may_be_a_convolution_after_the_pooling():
    model = build_model("timm:resnetv2_50x1_bit", 7).eval()
    with torch.no_grad():
        outputs = model.outputs(torch.randn(1, 3, 32, 32))
        torch.testing.assert_close(model.classifier_layer(outputs.pooled), outputs.logits)


def test_channels_last_maps_become_maps():
    """As above for swin, whose blocks give (N, H, W, C); images are not square, which tells rows from columns."""
    for name in ("timm:swin_tiny_patch4_window7_224", "torchvision:swin_t"):
        model = build_model(name, 7, image_size=(64, 96)).eval()
        with torch.no_grad():
            feats = model.outputs(torch.randn(1, 3, 64, 96)).feats
        assert [tuple(f.shape[1:]) for f in feats] == [
            (96, 16, 24),
            (96, 16, 24),
            (192, 8, 12),
            (384, 4, 6),
            (768, 2, 3),
        ]


def test_cifar_sized_images():
    with torch.no_grad():
        feats = build_model("torchvision:resnet18", 7).eval().outputs(torch.randn(1, 3, 32, 32)).feats
    assert [f.shape[-1] for f in feats] == [16, 8, 4, 2, 1]


@pytest.mark.slow
def test_auxiliary_heads_are_left_out():
    model = build_model("torchvision:googlenet", 7)
    published = torchvision.models.googlenet(num_classes=7, init_weights=False)
    assert any(key.startswith("aux1.") for key in published.state_dict())
    model.load_state_dict(published.state_dict(), strict=True)
    logits = model.train()(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 7)


def test_unknown_library_names():
    with pytest.raises(ValueError, match=r"timm .* has no model 'resnet18x' \(did you mean .*resnet18"):
        build_model("timm:resnet18x", 7)
    with pytest.raises(ValueError, match=r"torchvision .* has no classifier 'resnet19' \(did you mean resnet"):
        build_model("torchvision:resnet19", 7)
    # A detector is no classifier, and timm's remote sources are no names of models.
    for name in ("torchvision:fasterrcnn_resnet50_fpn", "timm:hf-hub:timm/resnet18.a1_in1k", "timm:local-dir:/tmp"):
        with pytest.raises(ValueError, match="has no"):
            build_model(name, 7)


def test_timm_is_not_needed_until_asked_for(monkeypatch):
    real_import = builtins.__import__

    def without_timm(name, *args, **kwargs):
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(ImportError, match="pip install timm"):
        build_model("timm:resnet18", 7)


@pytest.mark.parametrize(
    ("name", "exempt"),
    [
        ("timm:vit_tiny_patch16_224", {"cls_token", "pos_embed"}),
        ("torchvision:swin_t", {f"features.{i}" for i in (1, 3, 5, 7)}),
        ("torchvision:vit_b_32", {"class_token", "encoder.pos_embedding"}),
        ("torchvision:resnet18", set()),
    ],
)
def test_adamw_does_not_decay_tokens_and_positions(name, exempt):
    with torch.device("meta"):
        model = build_model(name, 7, image_size=32)
    solver = get_cfg().SOLVER
    solver.OPTIMIZER = "AdamW"
    decays = {
        p: group["weight_decay"] for group in build_optimizer(model, solver).param_groups for p in group["params"]
    }
    named = dict(model.named_parameters())
    assert decays.keys() == set(named.values())
    spared = {key for key, p in named.items() if p.ndim > 1 and not decays[p]}
    assert {key if key in exempt else key[:10] for key in spared} == exempt
    assert not any(decays[p] for p in named.values() if p.ndim <= 1)
