"""Mixup, cutmix and label smoothing: what student, teacher, cross-entropy and methods are given."""

import pytest
import torch
from torch.nn import functional as F

from d2distill.classification.data.mixing import build_soft_targets
from d2distill.common.distillers import DISTILLERS
from d2distill.common.engine.seeding import seed_step
from d2distill.common.errors import ConfigError
from d2distill.common.outputs import Batch
from tests.classification.distill_models import CLASSES, build, make_batch, make_cfg


def soften(batch, *opts, step=0):
    seed_step(3, step)
    return build_soft_targets(make_cfg([], *opts), CLASSES)(batch)


def test_no_setting_no_change():
    assert build_soft_targets(make_cfg([]), CLASSES) is None


@pytest.mark.parametrize("key", ["INPUT.MIXUP", "INPUT.CUTMIX"])
def test_images_and_targets_are_mixed_alike(key):
    """One image is 0 and of class 0, the other 200 and of class 1: the pixels tell the share of each class."""
    batch = {"image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "label": torch.tensor([0, 1])}
    batch["image"][1] = 200
    batch["key"] = torch.tensor([5, 80])
    mixed = soften(batch, key, 1.0)
    assert "key" not in mixed, "which is of one image's augmentation"
    share = mixed["image"].mean((1, 2, 3)) / 200
    torch.testing.assert_close(mixed["soft_target"][:, 1], share)
    torch.testing.assert_close(mixed["soft_target"].sum(1), torch.ones(2))
    assert 0 < share[0] < 1 and torch.equal(mixed["label"], batch["label"])
    assert batch["image"].dtype == torch.uint8 and set(batch["image"].unique().tolist()) == {0, 200}


def test_what_is_mixed_depends_on_seed_and_step():
    both = ("INPUT.MIXUP", 0.8, "INPUT.CUTMIX", 1.0)
    draws = [soften(make_batch(), *both, step=step) for step in (0, 0, 1, 2, 3, 4)]
    assert torch.equal(draws[0]["image"], draws[1]["image"])
    assert not any(torch.equal(draws[0]["image"], other["image"]) for other in draws[2:])
    # With both set each is taken at times: cutmix leaves whole pixels as they were.
    whole = [bool((draw["image"] == draw["image"].round()).all()) for draw in draws]
    assert any(whole) and not all(whole)


def test_label_smoothing_is_that_of_cross_entropy():
    batch = make_batch()
    model = build([]).eval()
    logits = model(batch)
    model.train().student.eval()
    loss = model(soften(batch, "SOLVER.LABEL_SMOOTHING", 0.1))["loss_ce"]
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch["label"], label_smoothing=0.1))


def test_teacher_and_methods_see_the_mixed_batch():
    seen = {}
    model, batch = build("KD"), soften(make_batch(), "INPUT.MIXUP", 1.0)
    model.distillers["kd"].register_forward_pre_hook(lambda _, args: seen.update(student=args[0], batch=args[2]))
    next(model.teacher.children()).register_forward_pre_hook(lambda _, args: seen.update(images=args[0]))
    losses = model(batch)
    assert isinstance(seen["batch"], Batch) and torch.equal(seen["batch"].soft_target, batch["soft_target"])
    torch.testing.assert_close(seen["images"], model.teacher_norms[0](batch["image"]))
    expected = -(batch["soft_target"] * seen["student"].logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses["loss_ce"], expected)


def test_methods_that_need_the_one_class_of_an_image_refuse_mixing():
    unable = {name for name, method in DISTILLERS if not method.takes_soft_target}
    assert unable == {"DKD", "NKD", "RLD", "USKD", "CRD"}
    for name in unable:
        with pytest.raises(ConfigError, match=rf"{name} needs the one class .* INPUT\.MIXUP mixes .*AT, BCKD, CWD"):
            build(name, "INPUT.MIXUP", 0.2)
        build(name, "SOLVER.LABEL_SMOOTHING", 0.1)  # the class stays known
