"""Every registered method in a DistillModel: a new one is tested the day it appears."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn

from d2distill.classification.networks import network_info
from d2distill.common.distillers import DISTILLERS
from d2distill.common.errors import ConfigError
from d2distill.common.outputs import Batch, Outputs, Progress
from tests.classification.distill_models import (
    CLASSES,
    METHODS,
    WITH_TEACHER,
    assert_finite,
    build,
    gradients,
    key,
    loss_of,
    make_batch,
    make_optimizer,
    network,
    seeded_losses,
    train_step,
)
from tests.interruptions import assert_identical


def methods_batch(batch, epoch=1):
    return Batch(batch["label"], index=batch["index"], progress=Progress(epoch=epoch))


per_method = pytest.mark.parametrize("name", METHODS)


def test_there_are_methods():
    assert len(METHODS) >= 23 and len(WITH_TEACHER) >= 22


@per_method
def test_losses_are_named_scalars_and_scaled(name):
    def loss(epoch, *opts):
        losses = seeded_losses(build(name, *opts), make_batch(), epoch)
        assert set(losses) == {"loss_ce", loss_of(name)}
        assert all(value.shape == () and value.isfinite() and value.dtype == torch.float32 for value in losses.values())
        return losses[loss_of(name)].item()

    unscaled = loss(2, key(name, "WEIGHT"), 1.0, key(name, "WARMUP"), 0)
    assert unscaled != 0
    assert loss(2, key(name, "WEIGHT"), 3.0, key(name, "WARMUP"), 0) == pytest.approx(3 * unscaled, rel=1e-5)
    assert loss(2, key(name, "WEIGHT"), 1.0, key(name, "WARMUP"), 8) == pytest.approx(unscaled / 4, rel=1e-5)
    assert loss(9, key(name, "WEIGHT"), 1.0, key(name, "WARMUP"), 8) == pytest.approx(unscaled, rel=1e-5)


@per_method
def test_gradients_reach_the_student_and_the_method_never_the_teacher(name):
    model, method = build(name), DISTILLERS.get(name)
    seeded_losses(model, make_batch())[loss_of(name)].backward()
    reached = {n: p.grad for n, p in model.student.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("layer") and n.endswith("conv1.weight") for n in reached)
    if "logits" in method.needs:
        assert set(reached) == {n for n, _ in model.student.named_parameters()}
    for n, p in model.distillers.named_parameters():
        # A bias before a batch norm has a gradient of 0, but it has one.
        assert not p.requires_grad or (p.grad is not None and (p.ndim == 1 or p.grad.any())), n
    assert_finite(*gradients(model))
    assert model.teacher is None or not gradients(model.teacher)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_training_leaves_the_teacher_alone(name):
    model = build(name)
    assert model.teacher is network("resnet14", 32)
    before, student = copy.deepcopy(model.teacher.state_dict()), copy.deepcopy(model.student.state_dict())
    optimizer = make_optimizer(model)
    for step in range(3):
        train_step(model, optimizer, step)
    assert_identical(dict(model.teacher.state_dict()), dict(before))
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert not any(m.training for m in model.teacher.modules())
    assert all(m.track_running_stats for m in model.teacher.modules() if isinstance(m, nn.BatchNorm2d))
    changed = model.student.state_dict()
    assert all(not torch.equal(student[n], changed[n]) for n, _ in model.student.named_parameters())
    assert changed["bn1.num_batches_tracked"] == student["bn1.num_batches_tracked"] + 3


def test_a_second_pass_of_the_teacher_changes_no_other_method():
    """OFD's batch statistics: the other methods see the running ones."""
    extra = [name for name, method in build(WITH_TEACHER).distillers.items() if method.teacher_extras]
    assert extra == ["ofd"]
    alone = {**seeded_losses(build("KD"), make_batch(), 5), **seeded_losses(build("OFD"), make_batch(), 5)}
    assert_identical(seeded_losses(build(["KD", "OFD"]), make_batch(), 5), alone)


def test_ofd_sees_the_teacher_under_batch_statistics():
    model, seen = build("OFD"), []
    hook = model.teacher.bn1.register_forward_hook(lambda module, _, output: seen.append(output))
    model(make_batch())
    hook.remove()
    norm = model.teacher.bn1
    whitened = (seen[-1] - norm.bias.view(-1, 1, 1)) / norm.weight.view(-1, 1, 1)
    assert len(seen) == 1 and whitened.mean((0, 2, 3)).abs().max() < 1e-4


@per_method
def test_settings_without_a_meaning(name):
    nonsense = {"WEIGHT": [-1.0, float("nan")], "WARMUP": [-1], "T": [0.0, -4.0, float("inf")], "ALPHA_T": [0.0]}
    known = DISTILLERS.get(name).common_defaults() | DISTILLERS.get(name).defaults()
    for setting in known.keys() & nonsense:
        for value in nonsense[setting]:
            with pytest.raises(ConfigError, match=rf"{name}: {setting} is {value}, but"):
                build(name, key(name, setting), value)


@per_method
def test_a_batch_of_one(name):
    losses = seeded_losses(model := build(name), make_batch(1))
    assert_finite(*losses.values())
    sum(losses.values()).backward()
    assert_finite(*gradients(model))


@per_method
def test_an_empty_batch(name):
    model = build(name)
    model.student.eval()  # batch norms have no statistics of nothing
    before = copy.deepcopy(model.state_dict())
    losses = seeded_losses(model, make_batch(0))
    assert losses[loss_of(name)].item() == 0 == losses["loss_ce"].item()
    sum(losses.values()).backward()
    assert_finite(*gradients(model.student))
    assert all(not gradient.any() for gradient in gradients(model))
    # Counts of batches may rise; nothing else has been learned.
    after = {n: v for n, v in model.state_dict().items() if "num_batches" not in n}
    assert_identical(after, {n: v for n, v in before.items() if "num_batches" not in n})


@per_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    model, plain = build(name), seeded_losses(build(name), make_batch())
    with torch.autocast("cpu", dtype):
        losses = seeded_losses(model, make_batch())
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert_finite(*losses.values())
    sum(losses.values()).backward()
    assert_finite(*gradients(model))
    # The networks' rounding is in it; a loss computed in half precision would be further off.
    torch.testing.assert_close(losses[loss_of(name)], plain[loss_of(name)], rtol=0.2, atol=0.05)


def large_outputs(info, scale, seed):
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return (scale * torch.randn(4, *shape, generator=generator)).requires_grad_()

    # Maps before a ReLU have both signs, those behind it do not.
    preacts = [tensor(*shape) for shape in info.preacts]
    return Outputs(tensor(info.num_classes), [p.relu() for p in preacts], preacts, tensor(info.pooled))


@per_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scales", [(1e4, 1.0), (1.0, 1e4), (0.0, 0.0)])
def test_outputs_of_any_scale(name, scales, dtype):
    distiller = build(name, key(name, "WARMUP"), 0).distillers[name.lower()]
    student, teacher = (
        large_outputs(network_info(network(network_name, 32), 32), scale, seed)
        for seed, (network_name, scale) in enumerate(zip(("resnet8", "resnet14"), scales, strict=True))
    )
    teacher.pooled = teacher.feats[-1].mean((2, 3)).detach().requires_grad_()
    teacher.extras = dict.fromkeys(distiller.teacher_extras, teacher.preacts)
    batch = make_batch()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = distiller(student, teacher, methods_batch(batch))
    assert_finite(loss)
    loss.backward()
    leaves = [student.logits, *student.preacts, student.pooled]
    assert_finite(*(leaf.grad for leaf in leaves if leaf.grad is not None))
    assert any(leaf.grad is not None for leaf in leaves)
    assert_finite(*(p.grad for p in distiller.parameters() if p.grad is not None), torch.zeros(1))
    assert all(leaf.grad is None for leaf in (teacher.logits, *teacher.preacts, teacher.pooled))


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_needs_are_the_truth(name):
    """A method works on outputs that have no more than what it says it needs of each network."""
    distiller = build(name).distillers[name.lower()]
    sides = []
    for network_name, needs in (("resnet8", distiller.student_needs), ("resnet14", distiller.teacher_needs)):
        own, images = network(network_name, 32).eval(), torch.rand(4, 3, 32, 32)
        nothing = {part: None for part in ("logits", "feats", "preacts", "pooled") if part not in needs}
        sides.append(replace(own.outputs(images), **nothing))
    sides[1].extras.update({n: provide(own, images) for n, provide in distiller.teacher_extras.items()})
    assert_finite(distiller(*sides, methods_batch(make_batch())))


@per_method
def test_a_saved_model_trains_on_as_if_never_stopped(name):
    model = build(name)
    optimizer = make_optimizer(model)
    for step in range(2):
        train_step(model, optimizer, step)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert not any(n.startswith("teacher") for n in saved["model"])
    other = build(name, seed=1)
    if list(other.distillers.parameters()):
        fresh = build(name, seed=0)
        assert any(not torch.equal(a, b) for a, b in zip(fresh.parameters(), other.parameters(), strict=True)), (
            "another seed draws the same connectors: the test would show nothing"
        )
    other.load_state_dict(saved["model"])
    other_optimizer = make_optimizer(other)
    other_optimizer.load_state_dict(saved["optimizer"])
    for step in range(2, 4):
        assert_identical(train_step(other, other_optimizer, step), train_step(model, optimizer, step))
        assert_identical(dict(other.state_dict()), dict(model.state_dict()))


def test_all_methods_together():
    model = build(METHODS)
    losses = seeded_losses(model, make_batch())
    assert list(losses) == ["loss_ce", *map(loss_of, METHODS)]
    assert list(model.distillers) == [name.lower() for name in METHODS]
    assert_finite(*losses.values())
    sum(losses.values()).backward()
    assert_finite(*gradients(model))
    assert losses["loss_ce"].item() == pytest.approx(seeded_losses(build([]), make_batch())["loss_ce"].item())
    assert model.eval()(make_batch()).shape == (4, CLASSES)


def test_without_a_teacher():
    alone = [name for name in METHODS if name not in WITH_TEACHER]
    model = build(alone, teacher=[])
    assert model.teacher is None and list(seeded_losses(model, make_batch())) == ["loss_ce", *map(loss_of, alone)]


@pytest.fixture
def register():
    """Methods of a test, which are unknown again after it."""
    added = []

    def register(method):
        added.append(DISTILLERS.register(method) or method.__name__)

    yield register
    for name in added:
        del DISTILLERS._obj_map[name]


def test_a_subclass_beside_its_method(register):
    """Each has its loss, its settings and its weight: neither replaces the other."""

    class MyRKD(DISTILLERS.get("RKD")):
        def forward(self, student, teacher, batch):
            return 2 * super().forward(student, teacher, batch)

    register(MyRKD)
    alone = seeded_losses(build("RKD"), make_batch())
    losses = seeded_losses(build(["RKD", "MyRKD"], key("MyRKD", "WEIGHT"), 3.0), make_batch())
    assert list(losses) == ["loss_ce", "loss_rkd", "loss_myrkd"]
    assert_identical({name: losses[name] for name in alone}, alone)
    torch.testing.assert_close(losses["loss_myrkd"], 6 * losses["loss_rkd"])


def test_a_method_called_ce_would_replace_the_cross_entropy(register):
    register(type("CE", (DISTILLERS.get("KD"),), {}))
    with pytest.raises(ConfigError, match="a method called CE would replace the cross-entropy's loss_ce"):
        build("CE")
