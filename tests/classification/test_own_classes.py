"""Weights of other classes, image sizes and libraries' older forms: what is taken, what stays fresh, who may teach."""

import re

import pytest
import timm
import torch
import torchvision

from d2distill.classification.data import build_dataset
from d2distill.classification.modeling import build_distiller
from d2distill.classification.models import build_model
from d2distill.classification.models.published_weights import adapt_torchvision
from d2distill.classification.networks import build_network
from d2distill.classification.trainer import evaluate
from d2distill.common.distillers import DISTILLERS
from d2distill.common.engine.seeding import seed_step
from d2distill.common.engine.weight_loading import load_state, load_weights, weights_for
from d2distill.common.errors import CheckpointError, ConfigError
from d2distill.tools.eval_cls import main as eval_cls
from tests.classification.distill_models import (
    CLASSES,
    ON_LOGITS,
    WITH_TEACHER,
    make_batch,
    make_cfg,
    network,
    seeded_losses,
)
from tests.goldens.fill import fill_by_name

pytestmark = pytest.mark.slow

# Side of the images here, classes of the published weights.
SIZE, IMAGENET = 32, 1000


def saved(folder, state, name="f.pth"):
    torch.save(state, folder / name)
    return str(folder / name)


def student_cfg(name, weights, *opts):
    return make_cfg([], "INPUT.SIZE", SIZE, "MODEL.STUDENT.NAME", name, "MODEL.STUDENT.WEIGHTS", weights, *opts)


def student(name, weights, *opts):
    cfg = student_cfg(name, weights, *opts)
    seed_step(0, 0)
    return build_network(cfg, "MODEL.STUDENT", cfg.MODEL.STUDENT, CLASSES)


@pytest.mark.parametrize(
    ("name", "classifiers"),
    [
        ("resnet8", ["fc"]),
        ("MobileNetV2", ["classifier"]),
        ("timm:test_resnet", ["fc"]),
        ("timm:test_vit", ["head"]),
        ("timm:test_convnext", ["head.fc"]),
        ("timm:deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
        ("torchvision:squeezenet1_1", ["classifier.1"]),
    ],
)
def test_a_student_from_weights_of_other_classes(tmp_path, name, classifiers, log):
    published = fill_by_name(build_model(name, IMAGENET, image_size=SIZE)).state_dict()
    source = saved(tmp_path, published)
    found, fresh = student(name, source), student(name, "")
    heads = tuple(f"{layer}." for layer in classifiers)
    for key, value in found.state_dict().items():
        expected = fresh.state_dict() if key.startswith(heads) else published
        assert torch.equal(value, expected[key]), key
    (line,) = [r.getMessage() for r in log.records if "fresh" in r.getMessage()]
    assert line.startswith(f"MODEL.STUDENT.WEIGHTS: {source} has 1000 classes, here are 10 classes")
    assert f"the classifier ({', '.join(classifiers)}) stays fresh" in line
    # For evaluation every weight must be there.
    with pytest.raises(CheckpointError, match="of another number of classes"):
        load_weights(fresh, source, "MODEL.STUDENT.WEIGHTS")


def test_evaluation_takes_no_other_classes(tmp_path):
    source = saved(tmp_path, build_model("resnet8", 7).state_dict())
    with pytest.raises(
        CheckpointError, match=r"^MODEL\.STUDENT\.WEIGHTS: .*f\.pth is of another number of classes than"
    ):
        evaluate(student_cfg("resnet8", source))


def test_other_classes_do_not_excuse_another_network(tmp_path):
    source = saved(tmp_path, build_model("resnet14", 7).state_dict())
    with pytest.raises(CheckpointError, match="of another network"):
        student("resnet8", source)


def test_a_librarys_weights_by_name(tmp_path, monkeypatch):
    """``timm:NAME`` as WEIGHTS is timm's own way, here with a file in the hub's place."""
    published = fill_by_name(timm.create_model("test_vit")).state_dict()
    file, create = saved(tmp_path, published), timm.create_model

    def without_hub(name, pretrained=False, **options):
        overlay = {"file": file, "custom_load": False} if pretrained else None
        return create(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(timm, "create_model", without_hub)
    found = student("timm:test_vit", "timm:test_vit").state_dict()
    assert found["head.weight"].shape[0] == CLASSES and found["pos_embed"].shape[1] == 1 + (SIZE // 16) ** 2
    assert all(torch.equal(value, published[key]) for key, value in found.items() if key.startswith("blocks."))


# ---- teachers


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory):
    """Weights of a teacher of 7 classes."""
    return saved(tmp_path_factory.mktemp("teacher"), fill_by_name(build_model("resnet14", 7)).state_dict())


def with_teacher(method, weights, *opts, teacher="resnet14"):
    cfg = make_cfg(method, "MODEL.STUDENT.NAME", "resnet8", "MODEL.TEACHER.NAME", teacher, *opts)
    cfg.MODEL.TEACHER.WEIGHTS = weights
    return build_distiller(cfg, num_samples=40).train()


def reads_logits(name):
    return "logits" in DISTILLERS.get(name).needs


@pytest.mark.parametrize("name", [name for name in WITH_TEACHER if not reads_logits(name) and name != "SimKD"])
def test_features_of_a_teacher_of_other_classes(name, other_teacher, log):
    model = with_teacher(name, other_teacher)
    assert model.teacher.fc.out_features == 7 and not model.teacher.training
    assert torch.equal(model.teacher.fc.weight, torch.load(other_teacher)["fc.weight"])
    assert "MODEL.TEACHER.NAME resnet14 has 7 classes, the data 10: it is a teacher for methods on features" in log.text
    assert seeded_losses(model, make_batch())[f"loss_{name.lower()}"].isfinite()


@pytest.mark.parametrize("name", [*(name for name in WITH_TEACHER if reads_logits(name)), "SimKD"])
def test_logits_of_a_teacher_of_other_classes(name, other_teacher):
    with pytest.raises(ConfigError, match=rf"^DISTILL\.{name.upper()}: {name} .*7.*$") as error:
        with_teacher(name, other_teacher)
    assert "10" in str(error.value) and "\n" not in str(error.value)


def test_teachers_of_different_classes(tmp_path, other_teacher):
    fitting = saved(tmp_path, network("resnet14", SIZE).state_dict())
    for order in ([fitting, other_teacher], [other_teacher, fitting]):
        with pytest.raises(ConfigError, match=rf"{ON_LOGITS[0]} averages the teachers' logits, but they have .*7"):
            with_teacher(ON_LOGITS[0], order, teacher=["resnet14", "resnet14"])
        assert with_teacher("RKD", order, teacher=["resnet14", "resnet14"]).teacher[order.index(fitting)]


def test_a_teacher_without_its_classifier(tmp_path, log):
    published = {n: v for n, v in timm.create_model("test_resnet").state_dict().items() if not n.startswith("fc.")}
    model = with_teacher("RKD", saved(tmp_path, published), teacher="timm:test_resnet")
    assert torch.equal(model.teacher.layer1[0].conv1.weight, published["layer1.0.conv1.weight"])
    assert "timm:test_resnet has no classes" in log.text
    assert seeded_losses(model, make_batch())["loss_rkd"].isfinite()


# ---- EMA


def test_the_averaged_networks_accuracy(tmp_path, command):
    """Live and averaged network each see one class everywhere."""
    model = build_model("resnet8", CLASSES)

    def seeing(label):
        state = {n: v.clone() for n, v in model.state_dict().items()}
        state["fc.weight"].zero_()
        state["fc.bias"].copy_(torch.eye(CLASSES)[label])
        return state

    averaged = {"n_averaged": torch.tensor(5), **{f"module.{n}": v for n, v in seeing(3).items()}}
    source = saved(tmp_path, {"model": seeing(8), "model_ema": averaged})
    labels = build_dataset("digits", "", "val").labels
    share = {label: 100 * (labels == label).float().mean().item() for label in (3, 8)}
    assert share[3] != share[8]
    assert evaluate(student_cfg("resnet8", source))["top1"] == pytest.approx(share[3])
    arguments = ("-m", "resnet8", "-d", "digits", "-c", source, "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0)
    assert f"top1 {share[8]:.2f}" in command(eval_cls, "--no-ema", *arguments)[1]
    for use_ema, label in ((True, 3), (False, 8)):
        teacher = with_teacher("KD", source, "MODEL.TEACHER.USE_EMA", use_ema, teacher="resnet8").teacher
        assert teacher.fc.bias.argmax() == label


# ---- the libraries' published forms


def as_timm_loads(file, name, **options):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": file}, **options).eval()


def test_dino_at_another_size(tmp_path, log):
    """The authors' DINOv2, made for images of 518 pixels, on images of 28."""
    name = "vit_small_patch14_dinov2"
    state = timm.create_model(name, img_size=518, num_classes=0).state_dict()
    state["mask_token"] = torch.zeros(1, 384)
    file = saved(tmp_path, state)
    expected = as_timm_loads(file, name, img_size=28, num_classes=0)
    model = build_model(f"timm:{name}", CLASSES, image_size=28).eval()
    load_state(model, weights_for(model, file, "KEY"), file, "KEY", model.classifiers)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(model.outputs(images).pooled, expected(images))
    assert "1 resized (pos_embed (1, 1370, 384) to (1, 5, 384)); 1 dropped or renamed (mask_token)" in log.text
    assert "has no classifier, here are 10 classes: the classifier (head) stays fresh" in log.text


def swin_of_its_authors(state):
    """A stage's downsampling at the end of the one before, other names, and masks."""
    old = {re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", n): v for n, v in state.items()}
    old = {n.replace("head.fc.", "head."): v for n, v in old.items()}
    index = {n.replace("bias_table", "index"): torch.zeros(49, 49).long() for n in old if n.endswith("bias_table")}
    return {"model": {**old, **index, "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}}


def deit3_of_its_authors(state):
    return {"model": {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): value for name, value in state.items()}}


# Of the way timm resizes tables of relative positions.
@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
@pytest.mark.parametrize(
    ("name", "by_authors"),
    [("swin_tiny_patch4_window7_224", swin_of_its_authors), ("deit3_small_patch16_224", deit3_of_its_authors)],
)
def test_files_of_the_authors(tmp_path, name, by_authors, log):
    """Loaded as timm's own loader does, positions resized to smaller images."""
    state = timm.create_model(name).state_dict()
    file = saved(tmp_path, by_authors(state))
    expected = as_timm_loads(file, name, img_size=64).state_dict()
    model = build_model(f"timm:{name}", IMAGENET, image_size=64)
    load_weights(model, file, "KEY")
    found = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    # No weight is a fresh one.
    same = [key for key, value in found.items() if value.shape == state[key].shape]
    assert len(same) < len(found) and all(torch.equal(found[key], state[key]) for key in same)
    assert "is adapted to the network" in log.text


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torchvision's and timm's Inception-v3 as published, with an auxiliary head."""
    return {
        "torchvision:inception_v3": torchvision.models.inception_v3(weights=None, init_weights=False).state_dict(),
        "timm:inception_v3": timm.create_model("inception_v3", aux_logits=True).state_dict(),
    }


@pytest.mark.parametrize("name", ["torchvision:inception_v3", "timm:inception_v3"])
def test_auxiliary_heads(tmp_path, inception, name, log):
    state = inception[name]
    model = build_model(name, IMAGENET)
    load_weights(model, saved(tmp_path, state), "KEY")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert any(key.startswith("AuxLogits.") for key in state) and "dropped or renamed (AuxLogits." in log.text


def test_old_names_of_torchvision():
    """DenseNet's published files have them; torchvision renames while it downloads."""
    state = torchvision.models.DenseNet(4, (2, 2), 8).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): value for name, value in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    adapted = adapt_torchvision(torchvision.models.DenseNet(4, (2, 2), 8), old)
    assert adapted.keys() == state.keys() and all(adapted[name] is value for name, value in state.items())


def test_torchvisions_vision_transformer_at_another_size():
    """Its published files have old names as well."""
    large, small = (torchvision.models.VisionTransformer(size, 32, 2, 2, 8, 16) for size in (224, 64))
    torch.nn.init.normal_(large.encoder.pos_embedding)
    before, name = large.state_dict(), "encoder.pos_embedding"
    old = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for n, v in before.items()}
    after = adapt_torchvision(small, old)
    small.load_state_dict(after, strict=True)
    assert all(after[key] is value for key, value in before.items() if key != name)
    # The class token's is no place in the grid; the grid's corners stay what they are.
    assert after[name].shape == (1, 5, 8) and torch.equal(after[name][:, 0], before[name][:, 0])
    corners = before[name][:, 1:].unflatten(1, (7, 7))[:, ::6, ::6].flatten(1, 2)
    torch.testing.assert_close(after[name][:, 1:], corners)


def test_positions_of_another_kind_of_image_are_named(tmp_path):
    """What no filter resizes is said to be of another image size."""
    state = timm.create_model("crossvit_tiny_240").state_dict()
    model = build_model("timm:crossvit_tiny_240", IMAGENET, image_size=240)
    state["pos_embed_0"] = torch.zeros(1, 401 + 40, 96)
    with pytest.raises(CheckpointError, match="is of another image size than CrossVit here"):
        load_weights(model, saved(tmp_path, state), "KEY")
