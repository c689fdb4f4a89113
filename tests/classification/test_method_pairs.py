"""Every registered method between networks that differ in kind, depth, width and size of their maps."""

import pytest
import torch

from tests.classification.distill_models import (
    METHODS,
    ON_LOGITS,
    WITH_TEACHER,
    assert_finite,
    build,
    gradients,
    loss_of,
    make_batch,
    make_optimizer,
    seeded_losses,
)

pytestmark = pytest.mark.slow

ON_FEATURES = [name for name in METHODS if name not in ON_LOGITS]
PAIRS = [
    ("resnet32x4", "ShuffleV2"),
    ("ResNet50", "MobileNetV2"),
    ("wrn_40_2", "ShuffleV1"),
]
# Of one shape, but with other weights: a pair of equals would have losses of 0.
VIT, DEIT = "timm:vit_tiny_patch16_224", "timm:deit_tiny_patch16_224"
#: Where a method cannot apply, and what it says; everything else must work.
REFUSED = {
    ("OFD", VIT): "this teacher names none",
    ("SimKD", VIT): "does not take the average of its last map",
    ("SimKD", "MobileNetV2"): "this teacher's map has 160 channels, its classifier takes 1280",
}


def one_step(name, teacher, student, size=32, image_size=None):
    batch = make_batch(4, image_size or (size, size))
    if (name, teacher) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, teacher]):
            seeded_losses(build(name, teacher=teacher, student=student, size=size), batch)
        return
    model = build(name, teacher=teacher, student=student, size=size)
    losses = seeded_losses(model, batch, epoch=2)
    assert set(losses) == {"loss_ce", loss_of(name)}
    assert_finite(*losses.values())
    losses[loss_of(name)].backward(retain_graph=True)
    assert any(gradient.any() for gradient in gradients(model.student))
    assert all(p.grad is not None for p in model.distillers.parameters() if p.requires_grad)
    losses["loss_ce"].backward()
    assert_finite(*gradients(model))
    assert not gradients(model.teacher) if name in WITH_TEACHER else model.teacher is None
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    make_optimizer(model).step()
    assert_finite(*model.parameters(), *model.buffers())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_pairs_of_the_literature(teacher, student, name):
    one_step(name, teacher, student)


@pytest.mark.parametrize("name", ON_FEATURES)
@pytest.mark.parametrize(
    ("teacher", "student", "size", "image_size"),
    [
        ("wrn_16_1", "MobileNetV2", 64, (64, 64)),
        # Of another size than the connectors were built for, as with detectors.
        ("resnet14", "resnet8", 32, (32, 48)),
        ("vgg8", "MobileNetV2", 32, (64, 32)),
        ("MobileNetV2", "vgg8", 32, (64, 96)),
    ],
)
def test_other_sizes(teacher, student, size, image_size, name):
    one_step(name, teacher, student, size, image_size)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("teacher", "student"), [(VIT, "resnet8"), ("resnet14", DEIT), (VIT, DEIT)])
def test_vision_transformers(teacher, student, name):
    one_step(name, teacher, student, size=64)
