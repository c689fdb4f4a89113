"""Every published form of a detector's weights is read; errors name the config key and what does not fit."""

import logging
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import mobilenet_v2, resnet18, resnet50

from d2distill.common.engine import weight_files
from d2distill.common.errors import CheckpointError
from d2distill.detection.weights import has_teacher, load_student, load_teacher, read_detector
from tests.detection.stock_detectors import KEYS, detector, drawn, equal, narrow_detector, save

BACKBONE = "backbone.bottom_up."
MOBILENET = "build_mobilenetv2_fpn_backbone"


@pytest.fixture(scope="module")
def student():
    return narrow_detector()


@pytest.fixture(scope="module")
def state(student):
    return {name: value.clone() for name, value in student.state_dict().items()}


@pytest.fixture
def other():
    """Another student, with other weights."""
    return narrow_detector(seed=1)


def warnings(log):
    return [r.getMessage() for r in log.records if r.levelno >= logging.WARNING and r.name.endswith("d2distill")]


def as_pickle(path, content):
    path.write_bytes(pickle.dumps(content, 2))
    return str(path)


def arrays(state):
    return OrderedDict((name, np.asfortranarray(value.numpy())) for name, value in state.items())


# ---- forms of files


def test_weights_that_are_not_finite(tmp_path, state, student):
    name = f"{BACKBONE}stem.conv1.weight"
    bad = {**state, name: torch.full_like(state[name], float("nan"))}
    for source in (save(tmp_path / "bad.pth", bad), as_pickle(tmp_path / "bad.pkl", {"model": arrays(bad)})):
        with pytest.raises(
            CheckpointError, match=rf"^MODEL\.WEIGHTS: {source} is not finite: {name} has NaN or infinite"
        ):
            load_student(student, source)
    caffe2 = as_pickle(tmp_path / "caffe2.pkl", {"blobs": {"conv1_w": np.full((8, 3, 7, 7), np.inf, "float32")}})
    with pytest.raises(CheckpointError, match=r"caffe2\.pkl is not finite: stem\.conv1\.weight"):
        read_detector(caffe2)


def test_forms(tmp_path, state):
    merged = {f"module.{n}": v for n, v in state.items()} | {f"module.teacher.{n}": v for n, v in state.items()}
    beside = {"pixel_mean": torch.ones(3, 1, 1), "proposal_generator.anchor_generator.cell_anchors.0": torch.ones(3, 4)}
    run = {**state, "distillers.x.weight": torch.ones(2)}
    save_file(state, tmp_path / "f.safetensors")
    sources = [
        save(tmp_path / "bare.pth", state),
        save(tmp_path / "model.pth", state, iteration=3, optimizer={"state": {}}),
        save(tmp_path / "old.pth", {**state, **beside}, __author__="x"),
        save(tmp_path / "run.pth", run, trainer={"iteration": 3}),
        str(tmp_path / "f.safetensors"),
        as_pickle(tmp_path / "zoo.pkl", {"model": arrays(state), "__author__": "Detectron2 Model Zoo"}),
        save(tmp_path / "of_torch.pkl", state),
    ]
    for source in sources:
        weights = read_detector(source)
        assert equal(weights.state, state) and not weights.teacher and not weights.matching_heuristics, source
        assert not has_teacher(source)
    assert read_detector(sources[5]).author == "Detectron2 Model Zoo"
    source = save(tmp_path / "merged.pth", merged, x=1)
    weights = read_detector(source)
    assert equal(weights.state, state) and equal(weights.teacher, state) and has_teacher(source)
    assert not has_teacher("") and not has_teacher("torchvision:ResNet18_Weights.DEFAULT")


def test_numbers_of_other_kinds(tmp_path):
    content = {
        "a": np.arange(3, dtype=">f4"),
        "b": np.float16([1, 2]),
        "c": np.int64(4),
        "d": None,
        "e": np.array(2.0),
        "f": 3,
    }
    state = read_detector(as_pickle(tmp_path / "f.pkl", {"model": content})).state
    assert {n: v.dtype for n, v in state.items()} == {
        "a": torch.float32, "b": torch.float16, "c": torch.int64, "e": torch.float64, "f": torch.int64
    }  # fmt: skip
    assert state["a"].tolist() == [0, 1, 2] and state["c"].shape == state["e"].shape == ()


class Evil:
    def __reduce__(self):
        return eval, ("__import__('os').mkdir('pwned')",)


def test_a_malicious_file_is_refused(tmp_path, monkeypatch, student):
    monkeypatch.chdir(tmp_path)
    as_pickle(tmp_path / "evil.pkl", {"model": {"a": Evil()}})
    torch.save({"model": {"a": Evil()}}, tmp_path / "evil.pth")
    for name in ("evil.pkl", "evil.pth"):
        with pytest.raises(CheckpointError, match=rf"^MODEL\.WEIGHTS: .*refused?.*{name}|{name} is refused") as error:
            load_student(student, name)
        assert "eval" in str(error.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["f.pth", "f.safetensors", "f.pkl"])
def test_damaged_files(tmp_path, state, student, name):
    path = tmp_path / name
    backbone = {n: t for n, t in state.items() if "res2" in n}
    if name == "f.pkl":
        as_pickle(path, {"model": arrays(backbone)})
    else:
        (save_file if name == "f.safetensors" else torch.save)(backbone, path)
    content = path.read_bytes()
    for broken in (b"", b"hello", content[: len(content) // 2], content[:-1]):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=rf"^KEY: .*{name}"):
            load_student(student, str(path), "KEY")


def test_flipped_bits(tmp_path, state):
    path = tmp_path / "f.pth"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        read_detector(str(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.pth", "no checkpoint at .*nowhere.pth"),
        ("http://127.0.0.1:9/y.pkl", "cannot be fetched"),
        ("torchvision:No_Weights.X", "cannot load the weights"),
        ("timm:no_model", "cannot load the weights"),
    ],
)
def test_unreachable(student, source, message):
    with pytest.raises(CheckpointError, match=rf"^MODEL\.WEIGHTS: .*{message}"):
        load_student(student, source)


def test_files_without_weights(tmp_path, student):
    for content in ([1, 2], {"model": {"a": "text"}}, {}, 5):
        for path in (save(tmp_path / "f.pth", content), as_pickle(tmp_path / "f.pkl", content)):
            with pytest.raises(CheckpointError, match="holds no state dict"):
                load_student(student, path)


# ---- students


def test_round_trip(tmp_path, state, other, log):
    load_student(other, save(tmp_path / "f.pth", state), complete=True)
    assert equal(other.state_dict(), state)
    n = len(state)
    assert f"f.pth: {n} of {n} tensors (backbone, proposal_generator, roi_heads)" in log.text and not warnings(log)


def test_nothing_to_do(other):
    before = {n: t.clone() for n, t in other.state_dict().items()}
    load_student(other, "")
    assert equal(before, other.state_dict())


def test_teacher_and_distillers_are_left_alone(tmp_path, state, other):
    other.teacher, other.distillers = narrow_detector(seed=2), nn.ModuleDict({"x": nn.Linear(2, 2)})
    before = {n: t.clone() for n, t in other.state_dict().items() if n.startswith(("teacher.", "distillers."))}
    merged = {**state, **{f"teacher.{n}": v for n, v in state.items()}, "distillers.x.weight": torch.ones(2, 2)}
    load_student(other, save(tmp_path / "f.pth", merged), complete=True)
    after = other.state_dict()
    assert equal({n: after[n] for n in before}, before) and equal({n: after[n] for n in state}, state)


def test_backbone_only(tmp_path, state, other, log):
    before = {n: t.clone() for n, t in other.state_dict().items()}
    source = save(tmp_path / "f.pth", {n: t for n, t in state.items() if n.startswith(BACKBONE)})
    load_student(other, source)
    assert f"f.pth: 265 of {len(state)} tensors (backbone)" in log.text and not warnings(log)
    after = other.state_dict()
    assert equal(after, {n: (state if n.startswith(BACKBONE) else before)[n] for n in state})
    with pytest.raises(CheckpointError, match=r"^TEACHER\.MODEL\.WEIGHTS: .*ImageNet backbone weights, not a trained"):
        load_teacher(other, source)
    with pytest.raises(CheckpointError, match="ImageNet backbone weights"):
        load_student(other, source, complete=True)


def test_other_classes(tmp_path, state, log):
    source, model = save(tmp_path / "f.pth", state), narrow_detector(classes=7)
    heads = [f"roi_heads.box_predictor.{n}.{p}" for n in ("cls_score", "bbox_pred") for p in ("weight", "bias")]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    load_student(model, source)
    (warning,) = warnings(log)
    assert "skipped heads" in warning and "cls_score.weight (6, 8) instead of (8, 8)" in warning
    assert equal(model.state_dict(), {n: (before if n in heads else state)[n] for n in state})
    message = r"for another number of classes: .*\(6, 8\) instead of \(8, 8\).* or set MODEL\.ROI_HEADS\.NUM_CLASSES"
    with pytest.raises(CheckpointError, match=message):
        load_student(model, source, complete=True)
    with pytest.raises(CheckpointError, match=r"^TEACHER.*set TEACHER\.MODEL\.ROI_HEADS\.NUM_CLASSES"):
        load_teacher(model, source)


def test_other_classes_of_a_retinanet(tmp_path, log):
    name = "build_retinanet_mobilenetv2_fpn_backbone"
    source = save(tmp_path / "f.pth", detector(name).state_dict())
    model = detector(name, classes=3)
    load_student(model, source)
    assert "head.cls_score.weight (15, 16, 3, 3) instead of (9, 16, 3, 3)" in warnings(log)[0]
    with pytest.raises(CheckpointError, match=r"for another number of .*TEACHER\.MODEL\.RETINANET\.NUM_CLASSES"):
        load_teacher(model, source)


def test_other_classes_of_a_mask_rcnn(tmp_path, log):
    mask_head = {"NAME": "MaskRCNNConvUpsampleHead", "NUM_CONV": 1, "CONV_DIM": 8}
    masks = {"MODEL__MASK_ON": True} | {f"MODEL__ROI_MASK_HEAD__{key}": value for key, value in mask_head.items()}
    theirs, model = narrow_detector(**masks).state_dict(), narrow_detector(classes=7, seed=1, **masks)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    load_student(model, save(tmp_path / "f.pth", theirs))
    assert "skipped heads for another number of classes: 6 of another shape" in warnings(log)[0]
    kept = {n for n in before if "box_predictor" in n or "mask_head.predictor" in n}
    assert len(kept) == 6 and equal(model.state_dict(), {n: (before if n in kept else theirs)[n] for n in before})


def test_other_networks(tmp_path, state, student):
    before = {n: t.clone() for n, t in state.items()}
    deeper = save(tmp_path / "r101.pth", narrow_detector(101).state_dict())
    wider = state | {f"{BACKBONE}res3.0.conv1.weight": torch.ones(9, 16, 1, 1)}
    anchors = {**state, "proposal_generator.rpn_head.objectness_logits.bias": torch.ones(5)}
    missing = {n: t for n, t in state.items() if n != "backbone.fpn_output3.bias"}
    for source, complete, message in (
        (deeper, False, r"another depth: its res4 has 23 blocks, the network's 6; see MODEL\.RESNETS\.DEPTH"),
        (deeper, True, "another depth"),
        (save(tmp_path / "a.pth", wider), False, r"conv1\.weight \(9, 16, 1, 1\) instead of \(16, 16, 1, 1\)"),
        (save(tmp_path / "b.pth", anchors), False, r"objectness_logits\.bias \(5,\) instead of \(3,\)"),
        (save(tmp_path / "c.pth", missing), True, r"another network than GeneralizedRCNN: 1 missing \(backbone\.fpn_o"),
        (save(tmp_path / "d.pth", {"x.y": torch.ones(2)}), False, r"nothing of it fits: it has x\.y; the network has"),
        (save(tmp_path / "e.pth", {"teacher.y": torch.ones(2)}), False, "nothing of it fits: it has a teacher only"),
    ):
        with pytest.raises(CheckpointError, match=rf"^KEY: {tmp_path}/.*{message}"):
            load_student(student, source, "KEY", complete)
    assert equal(student.state_dict(), before), "a file that is refused changes nothing"


def test_missing_and_unexpected_tensors_are_logged(tmp_path, state, other, log):
    odd = {n: t for n, t in state.items() if n != f"{BACKBONE}stem.conv1.norm.bias"} | {"mask_head.a": torch.ones(1)}
    load_student(other, save(tmp_path / "f.pth", odd))
    (warning,) = warnings(log)
    assert "1 missing (backbone.bottom_up.stem.conv1.norm.bias); 1 unexpected (mask_head.a)" in warning


def test_batch_norms_with_and_without_step_counters(tmp_path, state):
    model = narrow_detector(MODEL__RESNETS__NORM="BN")
    load_student(model, save(tmp_path / "f.pth", state), complete=True)
    trained = {n: t.clone() for n, t in model.state_dict().items()}
    assert sum(n.endswith("num_batches_tracked") for n in trained) == 53
    frozen = narrow_detector(seed=3)
    load_student(frozen, save(tmp_path / "f.pth", trained), complete=True)
    assert equal(frozen.state_dict(), state)


# ---- teachers


def test_teacher_of_a_merged_file(tmp_path, state, other):
    theirs = narrow_detector(101, seed=4).state_dict()
    merged = {**{f"teacher.{n}": v for n, v in state.items()}, **theirs}
    load_teacher(other, save(tmp_path / "f.pth", merged))
    assert equal(other.state_dict(), state)


def test_teacher_needs_weights(student):
    with pytest.raises(CheckpointError, match=r"^TEACHER\.MODEL\.WEIGHTS is empty"):
        load_teacher(student, "")


# ---- other names


def flat(state):
    """`state` with MobileNetV2's names as MDistiller has them."""
    first, others = (
        {"0.0": "0", "0.1": "1", "1": "3", "2": "4"},
        dict(zip(["0.0", "0.1", "1.0", "1.1", "2", "3"], "013467", strict=True)),
    )
    named = {}
    for name, value in state.items():
        head, conv, tail = name.partition(".conv.")
        if conv and "features." in head:
            place, _, last = tail.rpartition(".")
            name = f"{head}.conv.{(first if head.endswith('.1') else others)[place]}.{last}"
        named[name] = value
    return named


def test_public_mobilenetv2(tmp_path):
    ours = detector(MOBILENET, MODEL__FPN__OUT_CHANNELS=256)
    state = ours.state_dict()
    public = flat(state)
    of_backbone = {n: list(t.shape) for n, t in public.items() if n.startswith("backbone.")}
    assert of_backbone == KEYS["mobilenetv2_fpn"]
    merged = {**public, **{f"teacher.{n}": t for n, t in public.items()}}
    source = save(tmp_path / "f.pth", merged)
    for load in (load_teacher, lambda *a: load_student(*a, complete=True)):
        other = detector(MOBILENET, seed=1, MODEL__FPN__OUT_CHANNELS=256)
        load(other, source)
        assert equal(other.state_dict(), state)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_libraries(monkeypatch, log, library):
    other = detector(seed=1)
    theirs = drawn(resnet18(), 5).state_dict()
    monkeypatch.setattr(weight_files, "_read_library", lambda *names: theirs if names == (library, "a.b") else {})
    load_student(other, f"{library}:a.b")
    assert "100 of" in log.text and not warnings(log)
    own = other.state_dict()
    assert torch.equal(own[f"{BACKBONE}res5.0.shortcut.norm.bias"], theirs["layer4.0.downsample.1.bias"])


def test_other_input_than_the_librarys(monkeypatch, log):
    theirs = drawn(resnet50(), 5).state_dict()
    monkeypatch.setattr(weight_files, "_read_library", lambda *names: theirs)
    bgr = {"INPUT__FORMAT": "BGR", "MODEL__PIXEL_MEAN": [103.53, 116.28, 123.675], "MODEL__PIXEL_STD": [1.0] * 3}
    load_student(detector(depth=50), "timm:resnet50")
    assert not warnings(log)
    load_student(detector(depth=50, MODEL__RESNETS__STRIDE_IN_1X1=True, **bgr), "timm:resnet50")
    (warning,) = warnings(log)
    for part in ("INPUT.FORMAT RGB", "MODEL.PIXEL_MEAN [123.675", "PIXEL_STD [58.395", "STRIDE_IN_1X1 False"):
        assert part in warning


def test_a_local_classifier(tmp_path, other):
    theirs = drawn(mobilenet_v2(), 5).state_dict()
    source = save(tmp_path / "f.pth", theirs)
    read = read_detector(source)
    assert all(n.startswith(f"{BACKBONE}features.") for n in read.state) and read.author == "torchvision"
    assert not any("features.18." in n or "num_batches" in n for n in read.state) and len(read.state) == 51 * 5
    assert equal(read_detector(save(tmp_path / "flat.pth", flat(theirs))).state, read.state)
    with pytest.raises(CheckpointError, match="nothing of it fits"):
        load_student(other, source)


@pytest.mark.parametrize("extra", ["layer1.0.se.fc1.weight", "conv1.0.weight", "layer1.0.downsample.2.weight"])
def test_variants_of_resnet_are_refused(tmp_path, extra):
    with pytest.raises(CheckpointError, match=f"that detectors here lack: it has a {extra}"):
        read_detector(save(tmp_path / "f.pth", resnet18().state_dict() | {extra: torch.ones(1)}))


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv2_110d", "mobilenetv3_small_050"])
def test_relatives_of_mobilenetv2_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="that detectors here lack"):
        read_detector(save(tmp_path / "f.pth", timm.create_model(name).state_dict()))


# ---- files for Detectron2's heuristics


def short(state):
    return {n.removeprefix(BACKBONE): t for n, t in state.items() if n.startswith(BACKBONE)}


def test_imagenet_weights_of_the_zoo(tmp_path, state, other, log):
    content = {**short(state), "stem.fc.weight": torch.ones(10, 2)}
    content = {"model": arrays(content), "__author__": "torchvision", "matching_heuristics": True}
    source = as_pickle(tmp_path / "R-18.pkl", content)
    assert read_detector(source).matching_heuristics
    load_student(other, source)
    own = other.state_dict()
    assert equal(short(own), short(state)) and "265 of" in log.text and not warnings(log)
    with pytest.raises(CheckpointError, match="ImageNet backbone weights"):
        load_teacher(other, source)
    with pytest.raises(CheckpointError, match="another depth"):
        load_student(narrow_detector(101), source)
    content["model"]["res3.0.conv1.weight"] = np.zeros((9, 16, 1, 1), np.float32)
    with pytest.raises(CheckpointError, match=r"res3\.0\.conv1\.weight \(9, 16, 1, 1\) instead of"):
        load_student(other, as_pickle(tmp_path / "wrong.pkl", content))


def caffe2(state):
    """Names as Caffe2 has them: its batch norms are a scale and a shift."""
    named = {}
    for name, value in short(state).items():
        if "running" in name:
            continue
        name = name.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.", "")
        for new, old in (("conv1", "branch2a"), ("conv2", "branch2b"), ("conv3", "branch2c"), ("shortcut", "branch1")):
            name = name.replace(f".{new}", f".{old}")
        name = name.replace(".norm.weight", "_bn_s").replace(".norm.bias", "_bn_b").replace("res_conv1_bn.weight", "x")
        name = name.replace("res_conv1_bn.bias", "res_conv1_bn_b").replace(".weight", "_w")
        named[name.replace("x", "res_conv1_bn_s").replace(".", "_")] = value
    return named


@pytest.mark.parametrize("blobs", [False, True])
def test_caffe2(tmp_path, state, other, blobs, log):
    content = arrays(caffe2(state)) | {
        "conv1_w_momentum": np.zeros(3),
        "lr": np.float32(0.1),
        "pred_w": np.zeros((3, 2)),
    }
    source = as_pickle(tmp_path / "R-18.pkl", {"blobs": content, "cfg": "a: 1"} if blobs else content)
    load_student(other, source)
    own = short(other.state_dict())
    theirs = {n: t for n, t in short(state).items() if "running" not in n}
    assert equal({n: own[n] for n in theirs}, theirs) and not warnings(log)
    assert own["res2.0.conv1.norm.running_mean"].abs().max() == 0 and (own["stem.conv1.norm.running_var"] == 1).all()
