"""DistillModel: losses, warm-up, normalization, and a teacher that nothing touches."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2distill.classification.config import get_cfg
from d2distill.classification.modeling import build_distiller
from d2distill.classification.models import build_model
from d2distill.classification.networks import build_network, model_stats
from d2distill.common.distillers import DISTILLERS, Distiller, kd_loss
from d2distill.common.engine.checkpoint import save_student
from d2distill.common.engine.weight_files import read_weights
from d2distill.common.errors import CheckpointError, ConfigError
from d2distill.common.modules import captured_extras
from d2distill.common.outputs import Outputs
from tests.goldens.fill import array, fill_by_name


def make_cfg(*opts):
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            "MODEL.DEVICE",
            "cpu",
            "MODEL.STUDENT.NAME",
            "resnet8",
            "MODEL.TEACHER.NAME",
            "vgg8",
            "DATASETS.NAME",
            "cifar100",
        ]
    )
    cfg.merge_from_list(list(opts))
    return cfg


def make_batch(n=4, dtype=torch.uint8):
    images = (array(1, n, 3, 32, 32) * 60 + 120).clamp(0, 255)
    return {"image": images.to(dtype), "label": torch.arange(n) % 100, "index": torch.arange(n)}


KD_AND_DKD = ("DISTILL.METHODS", ["KD", "DKD"])


def test_losses_are_named_weighted_and_warmed_up():
    cfg = make_cfg(*KD_AND_DKD, "DISTILL.CE_WEIGHT", 0.25, "DISTILL.KD.WEIGHT", 0.5, "DISTILL.DKD.WARMUP", 20)
    model, batch = build_distiller(cfg), make_batch()
    model.student.eval()  # so that a second forward sees the same batch norms
    first, tenth, last = (model(batch, epoch) for epoch in (1, 10, 30))
    assert list(first) == ["loss_ce", "loss_kd", "loss_dkd"]
    mean, std = (torch.tensor(x).view(3, 1, 1) * 255 for x in ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)))
    images = (batch["image"] - mean) / std
    student, teacher = model.student(images), model.teacher(images)
    torch.testing.assert_close(first["loss_ce"], 0.25 * F.cross_entropy(student, batch["label"]))
    torch.testing.assert_close(first["loss_kd"], 0.5 * kd_loss(student, teacher, 4.0))
    torch.testing.assert_close(10 * first["loss_dkd"], tenth["loss_dkd"])
    torch.testing.assert_close(2 * tenth["loss_dkd"], last["loss_dkd"])
    assert torch.equal(first["loss_kd"], last["loss_kd"])


def test_each_network_normalizes_for_itself():
    statistics = ("MODEL.TEACHER.PIXEL_MEAN", [127.5] * 3, "MODEL.TEACHER.PIXEL_STD", [127.5] * 3)
    model = build_distiller(make_cfg(*KD_AND_DKD, *statistics))
    seen = {}
    for side in ("student", "teacher"):
        next(getattr(model, side).children()).register_forward_pre_hook(
            lambda m, x, side=side: seen.update({side: x[0]})
        )
    batch = make_batch()
    model(batch)
    torch.testing.assert_close(seen["teacher"], (batch["image"] - 127.5) / 127.5)
    torch.testing.assert_close(seen["student"][0, 0], (batch["image"][0, 0] - 0.5071 * 255) / (0.2675 * 255))


def test_bytes_and_floats_are_the_same():
    model = build_distiller(make_cfg(*KD_AND_DKD)).eval()
    batch = make_batch()
    as_float = {**batch, "image": batch["image"].float()}
    assert torch.equal(model(batch), model(as_float)) and model(batch).shape == (4, 100)


def test_the_teacher_is_left_alone():
    model, batch = build_distiller(make_cfg(*KD_AND_DKD)), make_batch()
    before = copy.deepcopy(model.teacher.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    for mode in (True, False, True):
        model.train(mode)
        assert not any(m.training for m in model.teacher.modules())
        assert model.student.training is mode
    sum(model(batch).values()).backward()
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in model.teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.parameters())
    assert all(p.grad is not None for p in model.student.parameters())


def test_the_teacher_is_in_no_checkpoint():
    model = build_distiller(make_cfg(*KD_AND_DKD))
    state = model.state_dict()
    assert state and all(name.startswith(("student.", "distillers.")) for name in state)
    other = build_distiller(make_cfg(*KD_AND_DKD))
    kept = copy.deepcopy(other.teacher.state_dict())
    other.load_state_dict(state)
    assert torch.equal(other.student.state_dict()["conv1.weight"], state["student.conv1.weight"])
    assert all(torch.equal(kept[k], v) for k, v in other.teacher.state_dict().items())
    del state["student.conv1.weight"]
    with pytest.raises(RuntimeError, match=r"student\.conv1\.weight"):
        other.load_state_dict(state)


def test_plain_training_has_no_teacher():
    model = build_distiller(make_cfg())
    assert model.teacher is None and list(model(make_batch())) == ["loss_ce"]


def test_given_networks_are_taken():
    student, teacher = build_model("resnet8", 100), build_model("resnet20", 100)
    model = build_distiller(make_cfg(*KD_AND_DKD), student, teacher)
    assert model.student is student and model.teacher is teacher and set(model.distillers) == {"kd", "dkd"}
    # They were looked at in eval mode.
    assert all(m.training for m in student.modules()) and not any(m.training for m in teacher.modules())


def test_empty_batch():
    model = build_distiller(make_cfg(*KD_AND_DKD))
    model.student.eval()
    losses = model(make_batch(0))
    assert all(value.item() == 0 for value in losses.values())
    sum(losses.values()).backward()


def test_published_checkpoint_forms_load(tmp_path, monkeypatch):
    teacher = fill_by_name(build_model("vgg8", 100))
    weights = teacher.state_dict()
    forms = {
        "model": {"model": weights, "epoch": 240},
        "bare": weights,
        "module": {"state_dict": {f"module.{k}": v for k, v in weights.items()}},
        "run": {"model": {f"student.{k}": v for k, v in weights.items()} | {"distillers.x": torch.zeros(1)}},
        "compiled": {"model_state_dict": {f"module._orig_mod.{k}": v for k, v in weights.items()}},
        "wrapped": {"net": {f"student.module.{k}": v for k, v in weights.items()}},
        "old": {"model": {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}},
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / f"{name}.pth")
    save_student(tmp_path / "ours.pth", weights)
    for path in tmp_path.iterdir():
        model = build_distiller(make_cfg(*KD_AND_DKD, "MODEL.TEACHER.WEIGHTS", str(path)))
        assert all(torch.equal(weights[k], v) for k, v in model.teacher.state_dict().items()), path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_weights("~/bare.pth").keys() == weights.keys()


def test_checkpoints_that_do_not_fit(tmp_path):
    cases = {
        "other": (build_model("vgg13", 100).state_dict(), "of another network than VGG"),
        "nothing": ({"epoch": 3}, "holds no state dict"),
        "code": ({"model": {}, "x": torch.nn.Linear}, r"more than weights: a pickled .*Linear.* save .*state_dict\(\)"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=f"MODEL.TEACHER.WEIGHTS: .*{message}"):
            build_distiller(make_cfg(*KD_AND_DKD, "MODEL.TEACHER.WEIGHTS", str(tmp_path / name)))
    for start in ("", "hello", "import torch", "not a checkpoint", "<!DOCTYPE html>", "version https://git-lfs"):
        (tmp_path / "text").write_text(start)
        with pytest.raises(CheckpointError, match="/text is no checkpoint: it does not begin"):
            read_weights(str(tmp_path / "text"))
    with pytest.raises(CheckpointError, match=f"there is no checkpoint at {tmp_path}/missing"):
        read_weights(str(tmp_path / "missing"))


def test_networks_and_methods_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"MODEL.STUDENT.NAME: unknown model 'resnet9' \(did you mean"):
        build_distiller(make_cfg("MODEL.STUDENT.NAME", "resnet9"))
    with pytest.raises(ConfigError, match=r"KD needs teacher 0 .*but MODEL.TEACHER.NAME names 0"):
        build_distiller(make_cfg(*KD_AND_DKD, "MODEL.TEACHER.NAME", ""))
    with pytest.raises(ConfigError, match="student has 100 classes and the teacher 10"):
        build_distiller(make_cfg(*KD_AND_DKD), teacher=build_model("vgg8", 10))
    with pytest.raises(ConfigError, match="no fixed number of classes"):
        build_distiller(make_cfg("DATASETS.NAME", "folder", "MODEL.STUDENT.NAME", "resnet8"))


@pytest.mark.parametrize(
    ("key", "name", "size", "message"),
    [
        ("MODEL.STUDENT", "vgg8", 1, r"INPUT.SIZE 1 \(Given input size: .*\): choose another size"),
        ("MODEL.STUDENT", "torchvision:vit_b_32", 50, r"INPUT.SIZE 50 \(Input shape indivisible .*"),
        ("MODEL.TEACHER", "torchvision:alexnet", 32, r"INPUT.SIZE 32 \(.*\): choose another size"),
    ],
)
def test_networks_that_do_not_take_the_images(key, name, size, message):
    with pytest.raises(ConfigError, match=rf"^{key}\.NAME:? {name}:? does not take images of {message}$"):
        build_distiller(make_cfg(*KD_AND_DKD, f"{key}.NAME", name, "INPUT.SIZE", size))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def outputs(self, images):
        return Outputs(torch.rand(len(images), 100) * self.weight)


def test_the_trial_of_a_network_leaves_no_trace(monkeypatch):
    for network, name in ((build_model("resnet8", 100), "resnet8"), (Noisy(), "own")):
        monkeypatch.setattr("d2distill.classification.networks.build_model", lambda *_, network=network, **__: network)
        before, generator = copy.deepcopy(network.state_dict()), torch.get_rng_state()
        cfg = make_cfg("MODEL.STUDENT.NAME", name)
        assert build_network(cfg, "MODEL.STUDENT", cfg.MODEL.STUDENT, 100) is network and network.training
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_cost():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False))
    assert model_stats(network, 5) == {"parameters": 108, "flops": 972}
    assert all(module.training for module in network.modules())  # a copy was looked at


def test_a_method_may_name_submodules():
    """Of both networks; one that is called twice gives a list. One that is not there, or not called, is an error."""
    student, teacher, seen = build_model("resnet8", 100), build_model("resnet8", 100), {}
    shared = nn.ReLU()
    teacher.layer1[0].conv1.register_forward_hook(lambda module, args, output: shared(output))
    teacher.layer1[0].conv2.register_forward_hook(lambda module, args, output: shared(output))
    teacher.shared, student.shared = shared, nn.Identity()

    class Looking(Distiller):
        needs = ("module:layer1.0.conv1",)

        def forward(self, student, teacher, batch):
            seen.update(student=student.extras, teacher=teacher.extras)
            return student.extras["module:layer1.0.conv1"].sum()

    DISTILLERS.register(Looking)
    try:
        model = build_distiller(make_cfg("DISTILL.METHODS", ["Looking"]), student, teacher)
        model.teacher_source.needs.add("module:shared")
        model(make_batch())["loss_looking"].backward()
        assert seen["student"]["module:layer1.0.conv1"].shape == (4, 16, 32, 32) and student.conv1.weight.grad.any()
        assert [output.shape[1] for output in seen["teacher"]["module:shared"]] == [16, 16]
        model.teacher_source.needs.add("module:layer9")
        with pytest.raises(AttributeError, match="layer9"):
            model(make_batch())
    finally:
        DISTILLERS._obj_map.pop("Looking")
    message = "CifarResNet did not call its submodule shared"
    with pytest.raises(ValueError, match=message), captured_extras(student, ["module:shared"]):
        student(torch.zeros(1, 3, 32, 32))
