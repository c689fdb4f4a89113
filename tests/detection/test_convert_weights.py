"""tools/convert_weights.py: its files load in stock Detectron2, and features are those of the classifier."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from safetensors.torch import load_file

from d2distill.common.errors import CheckpointError, ConfigError
from d2distill.detection.convert import convert_to_tensors, merge, split
from d2distill.detection.weights import load_student, load_teacher, read_detector
from d2distill.tools import convert_weights
from tests.detection.stock_detectors import detector, drawn, equal, narrow_detector, save

pytestmark = pytest.mark.slow

MOBILENET = "build_mobilenetv2_fpn_backbone"


def load_stock(model, path):
    """Load with Detectron2's own checkpointer; what it found missing, unexpected and of another shape."""
    left = []
    checkpointer = DetectionCheckpointer(model)
    checkpointer._log_incompatible_keys = left.append
    checkpointer.load(path)
    return left[0]


def resnet_maps(model, images):
    maps = []
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        maps.append(x)
    return maps


def mobilenet_maps(model, images):
    maps = {i: (images := block(images)) for i, block in enumerate(model.features)}
    return [maps[i] for i in (3, 6, 13, 17)]


def timm_maps(model, images):
    # Its last stage of stride 32 has the 160 and the 320 channels wide blocks, that of 16 the 64 and 96 ones.
    x, maps = model.bn1(model.conv_stem(images)), []
    for stage in model.blocks:
        x = stage(x)
        maps.append(x)
    return [maps[i] for i in (1, 2, 4, 6)]


@pytest.mark.parametrize(
    ("build", "backbone", "depth", "maps_of"),
    [
        (torchvision.models.resnet18, "build_resnet_fpn_backbone", 18, resnet_maps),
        (torchvision.models.resnet50, "build_resnet_fpn_backbone", 50, resnet_maps),
        (torchvision.models.mobilenet_v2, MOBILENET, 18, mobilenet_maps),
        (lambda: timm.create_model("resnet18"), "build_resnet_fpn_backbone", 18, None),
        (lambda: timm.create_model("mobilenetv2_100"), MOBILENET, 18, timm_maps),
    ],
    ids=["resnet18", "resnet50", "mobilenet_v2", "timm-resnet18", "timm-mobilenetv2_100"],
)
def test_features_are_the_classifiers(tmp_path, build, backbone, depth, maps_of):
    classifier = drawn(build(), 7).eval()
    out = tmp_path / "out.pth"
    message = convert_to_tensors(save(tmp_path / "in.pth", classifier.state_dict()), out)
    model = detector(backbone, depth=depth, seed=1)
    incompatible = load_stock(model, str(out))
    bottom_up = model.backbone.bottom_up
    assert message == f"wrote {out}: {len(bottom_up.state_dict())} tensors (backbone)"
    assert not incompatible.unexpected_keys and not incompatible.incorrect_shapes
    assert not [name for name in incompatible.missing_keys if "bottom_up" in name]
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours = list(bottom_up(images).values())
        if maps_of is None:
            theirs = classifier.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
        else:
            theirs = maps_of(classifier, images)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.std() > 1e-3
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def student():
    return narrow_detector().state_dict()


@pytest.fixture(scope="module")
def teacher():
    return narrow_detector(101, seed=1).state_dict()


def zoo(path, content):
    path.write_bytes(pickle.dumps(content, 2))
    return str(path)


def arrays(state):
    return {name: value.numpy() for name, value in state.items()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_safe(tmp_path, student, suffix):
    source = zoo(tmp_path / "f.pkl", {"model": arrays(student), "__author__": "Detectron2 Model Zoo"})
    out = tmp_path / f"f{suffix}"
    assert convert_to_tensors(source, out).startswith(
        f"wrote {out}: {len(student)} tensors (backbone, proposal_generator, r"
    )
    weights = read_detector(str(out))
    assert (
        equal(weights.state, student) and weights.author == "Detectron2 Model Zoo" and not weights.matching_heuristics
    )
    model = narrow_detector(seed=2)
    if suffix == ".pth":
        incompatible = load_stock(model, str(out))
        assert not any(incompatible)
    else:
        assert equal(load_file(out), student)
        load_student(model, str(out), complete=True)
    assert equal(model.state_dict(), student)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_of_a_view_only_what_is_seen_is_written(tmp_path, suffix):
    whole = torch.zeros(1000, 1000)
    torch.save({"model": {"roi_heads.a": whole[0], "roi_heads.b": whole.T[:2]}}, tmp_path / "in.pth")
    convert_to_tensors(str(tmp_path / "in.pth"), tmp_path / f"out{suffix}")
    assert (tmp_path / f"out{suffix}").stat().st_size < 20000 < (tmp_path / "in.pth").stat().st_size


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_the_heuristics_need_stays(tmp_path, student, suffix):
    prefix = "backbone.bottom_up."
    short = {n.removeprefix(prefix): v for n, v in student.items() if n.startswith(prefix)}
    source = zoo(tmp_path / "f.pkl", {"model": arrays(short), "__author__": "x", "matching_heuristics": True})
    out = str(tmp_path / f"f{suffix}")
    convert_to_tensors(source, out)
    assert read_detector(out).matching_heuristics
    model = narrow_detector(seed=2)
    if suffix == ".pth":
        load_stock(model, out)
    else:
        load_student(model, out)
    assert torch.equal(model.state_dict()[f"{prefix}res2.0.conv1.weight"], short["res2.0.conv1.weight"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_merge_and_split(tmp_path, student, teacher, suffix):
    a, b = save(tmp_path / "a.pth", student), save(tmp_path / "b.pth", teacher, __author__="y")
    out = str(tmp_path / f"m{suffix}")
    message = merge(a, b, out)
    assert (
        f"{len(student) + len(teacher)} tensors (backbone, proposal_generator, roi_heads, teacher.backbone," in message
    )
    weights = read_detector(out)
    assert equal(weights.state, student) and equal(weights.teacher, teacher)
    first, second = tmp_path / f"s{suffix}", tmp_path / f"t{suffix}"
    assert len(split(out, first, second)) == 2
    assert equal(read_detector(str(first)).state, student) and equal(read_detector(str(second)).state, teacher)
    ours, theirs = narrow_detector(seed=2), narrow_detector(101, seed=2)
    load_student(ours, out, complete=True)
    load_teacher(theirs, out)
    assert equal(ours.state_dict(), student) and equal(theirs.state_dict(), teacher)
    if suffix == ".pth":
        load_stock(theirs, str(second))
        assert equal(theirs.state_dict(), teacher)


@pytest.mark.parametrize("author", ["MSRA", "Caffe2"])
def test_merge_with_imagenet_weights_of_the_zoo(tmp_path, student, teacher, author):
    content = {"stem.conv1.weight": np.ones((64, 3, 7, 7)), "stem.fc.weight": np.ones(2), "res2.0.conv1.norm.bias": 1.0}
    if author == "Caffe2":
        content = {"conv1_w": np.ones((64, 3, 7, 7)), "fc1000_w": np.ones(2), "res2_0_branch2a_bn_b": np.ones(64)}
    source = zoo(tmp_path / "f.pkl", {"model": content, "__author__": author, "matching_heuristics": True})
    out = str(tmp_path / "m.pth")
    merge(source, save(tmp_path / "b.pth", teacher), out)
    weights = read_detector(out)
    assert equal(weights.teacher, teacher) and not weights.matching_heuristics
    assert list(weights.state) == ["backbone.bottom_up." + n for n in ("stem.conv1.weight", "res2.0.conv1.norm.bias")]


def test_what_cannot_be_converted(tmp_path, student, teacher):
    a, b = save(tmp_path / "a.pth", student), save(tmp_path / "b.pth", teacher)
    merged, out = str(tmp_path / "m.pth"), str(tmp_path / "out.pth")
    backbone = save(tmp_path / "r18.pth", torchvision.models.resnet18().state_dict())
    merge(a, b, merged)
    for call, error, message in (
        (lambda: merge(merged, b, out), CheckpointError, r"m\.pth has a teacher already: split it first"),
        (lambda: merge(a, backbone, out), CheckpointError, "cannot be the teacher"),
        (lambda: split(a, out, str(tmp_path / "t.pth")), CheckpointError, r"a\.pth has no teacher"),
        (lambda: convert_to_tensors(a, b), ConfigError, r"b\.pth exists; --force replaces it"),
        (lambda: convert_to_tensors(a, tmp_path / "x.pkl"), ConfigError, r"must end with \.pth or \.safetensors"),
        (lambda: convert_to_tensors(a, tmp_path / "no" / "x.pth"), ConfigError, "there is no folder"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not Path(out).exists() and equal(read_detector(b).state, teacher)
    convert_to_tensors(a, b, force=True)
    assert equal(read_detector(b).state, student)
    assert not list(tmp_path.glob("*.tmp"))


def test_command(tmp_path, monkeypatch, capsys):
    source, out = save(tmp_path / "r18.pth", torchvision.models.resnet18().state_dict()), str(tmp_path / "out.pth")
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", "backbone", source, out])
    convert_weights.main()
    assert capsys.readouterr().out == f"wrote {out}: 100 tensors (backbone)\n"
