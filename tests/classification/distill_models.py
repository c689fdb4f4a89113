"""Any registered method between two small networks, by the public way: configuration, build_distiller, batch."""

import copy
import functools

import torch

from d2distill.classification.config import get_cfg
from d2distill.classification.modeling import build_distiller
from d2distill.classification.models import build_model
from d2distill.common.distillers import DISTILLERS, LogitDistiller
from d2distill.common.engine.seeding import seed_step
from tests.goldens.fill import array

METHODS = [name for name, _ in DISTILLERS]
WITH_TEACHER = [name for name in METHODS if DISTILLERS.get(name).needs_teacher]
ON_LOGITS = [name for name in METHODS if issubclass(DISTILLERS.get(name), LogitDistiller)]
STANDARDIZED = [name for name in ON_LOGITS if not DISTILLERS.get(name).takes_sigmoid]
CLASSES, SAMPLES = 10, 40


def loss_of(name):
    return f"loss_{name.lower()}"


def make_cfg(methods, *opts):
    """Digits, whose networks are named but given by `build`."""
    cfg = get_cfg()
    methods = [methods] if isinstance(methods, str) else list(methods)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "DATASETS.NAME", "digits", "DISTILL.METHODS", methods, *opts])
    return cfg


def make_batch(n=4, size=(32, 32), seed=1):
    images = (array(seed, n, 3, *size) * 60 + 120).clamp(0, 255).to(torch.uint8)
    place = torch.arange(n) + 3 * seed
    return {"image": images, "label": place * 7 % CLASSES, "index": place % SAMPLES}


@functools.cache
def network(name, size):
    """Built once, with running statistics that are not those of a new network; to be copied before it is trained."""
    seed_step(11, len(name))
    model = build_model(name, CLASSES, image_size=size)
    with torch.no_grad():
        model.train()(array(5, 8, 3, size, size))
    return model


def build(methods, *opts, student="resnet8", teacher="resnet14", seed=0, size=32):
    """A DistillModel in training mode; the student is a copy of its own, connectors are drawn from `seed`.

    Teachers are shared by all tests, so that a method that changes one is seen by many.
    """
    teachers = [network(name, size) for name in ([teacher] if isinstance(teacher, str) else teacher)]
    cfg = make_cfg(methods, "INPUT.SIZE", size, *opts)
    # As another test's teacher it was frozen.
    own = copy.deepcopy(network(student, size)).requires_grad_()
    seed_step(seed, 0)  # after the networks, of which those that are built here draw numbers
    return build_distiller(cfg, own, teachers, num_samples=SAMPLES).train()


def key(name, setting):
    return f"DISTILL.{name.upper()}.{setting}"


def seeded_losses(model, batch, epoch=1, step=0):
    """Losses of the batch with the random numbers of step `step`."""
    seed_step(7, step)
    return model(batch, epoch)


def make_optimizer(model, lr=0.01):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, momentum=0.9, weight_decay=1e-2)


def train_step(model, optimizer, step):
    losses = seeded_losses(model, make_batch(6, seed=step + 1), epoch=step + 1, step=step)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    # Some weights of the literature are far too large for a step of a random network.
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return losses


def assert_finite(*tensors):
    assert tensors and all(tensor.isfinite().all() for tensor in tensors)


def gradients(module):
    return [p.grad for p in module.parameters() if p.grad is not None]
