"""A teacher without classes (DINO's features) for methods on features; one that was fine-tuned has classes."""

import pytest
import torch

from d2distill.classification.modeling import build_distiller
from d2distill.classification.models import build_model, is_without_classes
from d2distill.common.errors import ConfigError
from tests.classification.distill_models import make_batch, make_cfg, seeded_losses

pytestmark = pytest.mark.slow

# Patches of 14: 2 x 2 of them.
DINO = "timm:vit_small_patch14_dinov2.lvd142m"
NETWORKS = ("MODEL.STUDENT.NAME", "resnet8", "MODEL.TEACHER.NAME", DINO, "INPUT.SIZE", 28)


def test_which_networks_are_published_without_classes():
    assert is_without_classes(DINO) and not is_without_classes("timm:resnet18") and not is_without_classes("resnet8")


@pytest.mark.parametrize("method", ["RKD", "PKT", "AT", "CWD"])
def test_methods_on_features(method):
    model = build_distiller(make_cfg(method, *NETWORKS)).train()
    assert model.teacher.outputs(torch.zeros(1, 3, 28, 28)).logits is None
    loss = seeded_losses(model, make_batch(size=(28, 28)))[f"loss_{method.lower()}"]
    loss.backward()
    assert loss.isfinite() and model.student.conv1.weight.grad.any()


def test_methods_on_logits_refuse_it():
    with pytest.raises(ConfigError, match="KD needs the logits of both networks, but the teacher gives none"):
        build_distiller(make_cfg("KD", *NETWORKS))
    with pytest.raises(ConfigError, match="SimKD ends the student with the teacher's classifier"):
        build_distiller(make_cfg("SimKD", *NETWORKS))


def test_fine_tuned_weights_bring_classes(tmp_path):
    weights = build_model(DINO, 10, image_size=28).state_dict()
    torch.save(weights, tmp_path / "tuned.pth")
    torch.save({n: v for n, v in weights.items() if not n.startswith("head.")}, tmp_path / "features.pth")
    tuned = build_distiller(make_cfg("KD", *NETWORKS, "MODEL.TEACHER.WEIGHTS", str(tmp_path / "tuned.pth")))
    assert torch.equal(tuned.teacher.head.weight, weights["head.weight"])
    features = make_cfg("RKD", *NETWORKS, "MODEL.TEACHER.WEIGHTS", str(tmp_path / "features.pth"))
    assert torch.equal(build_distiller(features).teacher.pos_embed, weights["pos_embed"])
