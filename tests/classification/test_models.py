"""Our models against the reference's names, shapes and numbers (tests/goldens), and what holds for all of them."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d2distill.classification.models import build_model, model_names, register
from d2distill.classification.models.registry import MODEL_REGISTRY
from d2distill.classification.models.shufflenet import channel_shuffle
from tests.goldens.fill import array, fill_by_name

GOLDENS = Path(__file__).parents[1] / "goldens"
KEYS = json.loads((GOLDENS / "checkpoint_keys.json").read_text())
MODELS = json.loads((GOLDENS / "models.json").read_text())
NUM_CLASSES = {"cifar": 100, "tiny_imagenet": 200, "imagenet": 1000}
# One of each family, the smallest.
FAMILIES = [
    "cifar/resnet8",
    "cifar/resnet8x4",
    "cifar/ResNet18",
    "cifar/wrn_16_1",
    "cifar/vgg8",
    "cifar/MobileNetV2",
    "cifar/ShuffleV1",
    "cifar/ShuffleV2",
    "tiny_imagenet/MobileNetV2",
    "imagenet/ResNet18",
    "imagenet/MobileNetV1",
]
# Of the standard deviation. Seen on a CPU: 4e-6; a wrong ReLU, stride or order is thousands of times above.
TOLERANCE = 1e-4

all_models = pytest.mark.parametrize("name", sorted(KEYS))
families = pytest.mark.parametrize("name", FAMILIES)


def build(name: str) -> nn.Module:
    return build_model(name, NUM_CLASSES[name.split("/")[0]])


def small_images(name: str, batch: int = 4) -> torch.Tensor:
    # At 32 the networks that divide by 32 would end in maps of one position.
    size = 64 if name.startswith("imagenet") else 32
    return array(3, batch, 3, size, size)


def assert_like(tensor: torch.Tensor, golden: dict) -> None:
    """Shape, mean, standard deviation and first values, all relative to the standard deviation."""
    if "shape" in golden:
        assert list(tensor.shape) == golden["shape"]
    assert tensor.numel() == golden["n"]
    values = tensor.double().flatten()
    tolerance = TOLERANCE * golden["std"]
    assert abs(values.mean().item() - golden["mean"]) < tolerance
    assert abs(values.std().item() - golden["std"]) < tolerance
    torch.testing.assert_close(values[:4].tolist(), golden["first"], rtol=0, atol=tolerance)


def test_names():
    assert model_names() == sorted(KEYS)


@all_models
def test_state_dict_parameter_count_and_margin_norms(name):
    """Names and shapes are the reference's, so its checkpoints load strictly."""
    with torch.device("meta"):
        model = build(name)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == KEYS[name]
    if name in MODELS:
        assert sum(p.numel() for p in model.parameters()) == MODELS[name]["params"]
    norms = model.bn_before_relu
    reference = MODELS.get(name, {}).get("bn_before_relu")
    if not isinstance(reference, list):
        assert norms is None
        return
    names = {module: key for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    found = [names[norm] for norm in norms]
    if name.startswith("imagenet/ResNet"):
        # The reference leaves layer1 out; with it the list goes with preacts[1:].
        assert found[0].startswith("layer1.") and found[1:] == reference
    elif name == "imagenet/MobileNetV1":
        # No stem entry, so preacts[1:] does without the first of the reference's four.
        assert found == reference[1:]
    else:
        assert found == reference


@pytest.mark.parametrize("name", sorted(MODELS))
def test_goldens(name):
    golden = MODELS[name]
    model = fill_by_name(build(name)).eval()
    with torch.no_grad():
        outputs = model.outputs(array(7, 2, 3, golden["size"], golden["size"]))
    assert_like(outputs.logits, golden["logits"])
    row = torch.tensor(golden["logits_row"])
    torch.testing.assert_close(outputs.logits[0, : len(row)], row, rtol=0, atol=TOLERANCE * golden["logits"]["std"])

    pooled = outputs.pooled
    if name == "tiny_imagenet/MobileNetV2":  # the reference does not flatten it
        pooled = pooled[:, :, None, None]
    assert_like(pooled, golden["pooled_feat"])

    assert len(outputs.feats) == len(golden["feats"])
    for feat, expected in zip(outputs.feats, golden["feats"], strict=True):
        assert_like(feat, expected)
    if golden["preact_feats"] is None:
        assert outputs.preacts is None
        return
    preacts = list(outputs.preacts)
    if name.startswith("imagenet/ResNet"):
        # The reference's in-place ReLU has overwritten this one by the time that it is looked at; ours is the
        # batch norm's output, as it is meant to be.
        assert preacts[0].min() < 0
        preacts[0] = F.relu(preacts[0])
    assert len(preacts) == len(golden["preact_feats"])
    for preact, expected in zip(preacts, golden["preact_feats"], strict=True):
        assert_like(preact, expected)


@families
def test_training_step_reaches_every_parameter(name):
    model = build(name)
    outputs = model.outputs(small_images(name))
    # Every tensor handed out takes part: one that an in-place ReLU had overwritten would fail here.
    tensors = [outputs.logits, outputs.pooled, *outputs.feats, *(outputs.preacts or [])]
    sum(t.square().mean() for t in tensors).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    for key, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_batches_tracked == 1, f"{key} has seen the batch more than once"


@families
def test_preacts_lead_to_feats(name):
    model = fill_by_name(build(name)).eval()
    with torch.no_grad():
        outputs = model.outputs(small_images(name, batch=1))
    if outputs.preacts is None:
        assert "MobileNetV2" in name
        return
    pairs = list(zip(outputs.preacts, outputs.feats, strict=True))
    if name.startswith("imagenet/ResNet") or name == "imagenet/MobileNetV1":
        assert torch.equal(F.relu(pairs[0][0]), pairs[0][1])
    else:
        assert pairs[0][0] is pairs[0][1]
    for i, (preact, feat) in enumerate(pairs[1:]):
        assert preact.min() < 0
        if "wrn" in name:
            assert torch.equal(preact, model.bn_before_relu[i](feat))
        elif "ShuffleV2" in name:
            assert torch.equal(channel_shuffle(F.relu(preact), 2), feat)
        else:
            assert torch.equal(F.relu(preact), feat)
    if model.bn_before_relu is not None:
        assert [norm.num_features for norm in model.bn_before_relu] == [preact.shape[1] for preact, _ in pairs[1:]]


@families
def test_forward_is_the_classifier_layer_on_the_pooled_vector(name):
    model = build(name).eval()
    images = small_images(name)
    with torch.no_grad():
        outputs = model.outputs(images)
        assert torch.equal(model(images), outputs.logits)
        assert torch.equal(model.classifier_layer(outputs.pooled), outputs.logits)
    # Its parameters are the network's own, the last two.
    assert list(model.classifier_layer.parameters()) == list(model.parameters())[-2:]


@families
def test_num_classes_sets_the_classifier_only(name):
    with torch.device("meta"):
        shapes, other = ({k: v.shape for k, v in build_model(name, n).state_dict().items()} for n in (7, 11))
    assert shapes.keys() == other.keys()
    changed = [key for key in shapes if shapes[key] != other[key]]
    assert changed == list(shapes)[-2:]


@families
def test_other_image_sizes(name):
    model = build(name).eval()
    with torch.no_grad():
        outputs = model.outputs(array(4, 1, 3, 96, 64))
    assert outputs.logits.shape == (1, NUM_CLASSES[name.split("/")[0]])
    areas = [feat.shape[2] * feat.shape[3] for feat in outputs.feats]
    assert areas == sorted(areas, reverse=True)


def test_vgg_pools_once_more_for_64x64_images():
    model = build("cifar/vgg8").eval()
    for size, last in ((32, [4, 4]), (64, [8, 4])):
        with torch.no_grad():
            feats = model.outputs(array(4, 1, 3, size, size)).feats
        assert [feat.shape[-1] for feat in feats[-2:]] == last


def test_kaiming_initialization_is_fan_out():
    torch.manual_seed(0)
    conv = build("cifar/resnet32x4").layer3[0].conv1
    assert conv.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(("name", "layer"), [("cifar/vgg8", "classifier"), ("cifar/MobileNetV2", "classifier.0")])
def test_classifiers_that_begin_small(name, layer):
    torch.manual_seed(0)
    linear = build(name).get_submodule(layer)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02) and not linear.bias.any()


def test_bare_names_follow_the_family():
    def first_conv(*args, **kwargs):
        with torch.device("meta"):
            return tuple(build_model(*args, **kwargs).conv1.weight.shape)

    assert first_conv("ResNet18", 10) == (64, 3, 3, 3)
    assert first_conv("ResNet18", 10, model_family="imagenet") == (64, 3, 7, 7)
    assert first_conv("imagenet/ResNet18", 10, model_family="cifar") == (64, 3, 7, 7)
    # Only in another family than the one given: found there, in the order cifar, tiny_imagenet, imagenet.
    assert first_conv("resnet8", 10, model_family="imagenet") == (16, 3, 3, 3)
    assert first_conv("ResNet34", 10) == (64, 3, 7, 7)
    assert hasattr(build_model("MobileNetV2", 10, model_family="imagenet"), "blocks")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet33x4", {}, r"unknown model 'resnet33x4' .*resnet32x4.*timm:NAME.*torchvision:NAME"),
        ("RESNET32X4", {}, "resnet32x4"),
        ("hub:resnet18", {}, "unknown model"),
        ("timm:", {}, "unknown model"),
        ("imagenet/resnet8", {}, "unknown model"),
        ("resnet8", {"num_classes": 0}, "resnet8 needs a number of classes.*only timm"),
        ("torchvision:resnet18", {"num_classes": 0}, "torchvision:resnet18 needs a number of classes"),
        ("resnet8", {"model_family": "mnist"}, "unknown model family 'mnist', should be one of cifar"),
    ],
)
def test_what_cannot_be_built(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, **{"num_classes": 10, **settings})


def test_own_models(monkeypatch):
    """Under a family of their own too, which then may be a data set's."""
    monkeypatch.setattr(MODEL_REGISTRY, "_obj_map", dict(MODEL_REGISTRY._obj_map))
    register("mine/resnet8")(lambda num_classes: nn.Linear(3, num_classes))
    assert build_model("resnet8", 5, model_family="mine").out_features == 5
    with pytest.raises(AssertionError, match="'cifar/resnet8' was already registered in 'model'"):
        register("cifar/resnet8")(nn.Linear)
