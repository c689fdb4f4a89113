"""The feature methods between real networks: built from their specs, one backward pass each."""

import functools

import pytest
import torch

from d2distill.classification.models import build_model
from d2distill.classification.networks import infer_output_spec
from d2distill.common.config import CfgNode, add_distill_defaults
from d2distill.common.distillers import DISTILLERS, Context
from tests.goldens.fill import array

METHODS = ["FitNet", "AT", "NST", "PKT", "KDSVD", "OFD", "RKD", "VID", "SP", "ReviewKD"]
PAIRS = [
    ("resnet32x4", "resnet8x4"),
    ("vgg13", "MobileNetV2"),
    ("resnet32x4", "ShuffleV2"),
    ("ResNet50", "MobileNetV2"),
    ("wrn_40_2", "ShuffleV1"),
]


@functools.cache
def network(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=10)
    return model, infer_output_spec(model, 32)


@functools.cache
def outputs(name, training):
    # Three samples: of two, the one distance over the mean distance is 1 whatever the network does.
    return network(name)[0].train(training).outputs(array(1, 3, 3, 32, 32))


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_student_and_connectors_only(teacher, student, name):
    (teacher_model, teacher_spec), (student_model, student_spec) = network(teacher), network(student)
    cfg = CfgNode()
    add_distill_defaults(cfg)
    method = DISTILLERS.get(name)(cfg.DISTILL[name.upper()], student_spec, teacher_spec)
    assert not set(method.parameters()) & set(teacher_model.parameters())
    target = torch.tensor([1, 2, 3])
    losses = method(outputs(student, True), outputs(teacher, False), target, Context(time=20.0))
    assert list(losses) == [f"loss_{name.lower()}"]
    value = losses[f"loss_{name.lower()}"]
    for model in (student_model, teacher_model):
        model.zero_grad()
    value.backward(retain_graph=True)
    assert value.isfinite()
    grads = [p.grad for p in student_model.parameters() if p.grad is not None]
    assert sum(g.abs().sum() for g in grads) > 0 and all(g.isfinite().all() for g in grads)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    assert all(p.grad is None for p in teacher_model.parameters())


@pytest.mark.parametrize("teacher", ["ShuffleV1", "ShuffleV2"])
def test_teachers_without_batch_norms_before_their_relus_are_refused(teacher):
    cfg = CfgNode()
    add_distill_defaults(cfg)
    with pytest.raises(ValueError, match="batch norms before a ReLU"):
        DISTILLERS.get("OFD")(cfg.DISTILL.OFD, network("resnet8x4")[1], network(teacher)[1])
