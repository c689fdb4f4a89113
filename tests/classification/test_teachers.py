"""Several teachers at once, and the switch that standardizes logits, for every registered method."""

import pytest
import torch
from torch import nn

from d2distill.classification.modeling import build_distiller
from d2distill.common.distillers import DISTILLERS, kd_loss, nkd_loss, rld_loss, standardize_logits
from d2distill.common.errors import ConfigError
from d2distill.common.outputs import Batch, Outputs
from tests.classification.distill_models import (
    CLASSES,
    ON_LOGITS,
    STANDARDIZED,
    WITH_TEACHER,
    build,
    key,
    loss_of,
    make_batch,
    make_cfg,
    network,
    seeded_losses,
)
from tests.goldens.fill import array

ON_FEATURES = [name for name in WITH_TEACHER if name not in ON_LOGITS]
TEACHERS = ("wrn_16_1", "resnet14")
MEANS, STDS = ([100.0, 110.0, 120.0], [90.0] * 3), ([60.0] * 3, [70.0, 80.0, 90.0])
STATISTICS = ("MODEL.TEACHER.PIXEL_MEAN", list(MEANS), "MODEL.TEACHER.PIXEL_STD", list(STDS))


def test_networks_are_built_by_name_and_kept_out_of_checkpoints():
    model = build_distiller(make_cfg("KD", "MODEL.STUDENT.NAME", "resnet8", "MODEL.TEACHER.NAME", list(TEACHERS)))
    assert isinstance(model.teacher, nn.ModuleList)
    assert [type(teacher).__name__ for teacher in model.teacher] == ["WideResNet", "CifarResNet"]
    assert model.teacher_source.weights == [0.5, 0.5]
    state = model.state_dict()
    assert state and all(name.startswith("student.") for name in state)
    assert not any(m.training for m in model.train().teacher.modules())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    model.load_state_dict(state)


def test_kd_learns_from_the_average_of_the_softened_probabilities():
    model = build("KD", *STATISTICS, "MODEL.TEACHER.SHARES", [3.0, 1.0], key("KD", "T"), 2.0, teacher=TEACHERS)
    batch = make_batch()
    assert model.teacher_source.weights == [0.75, 0.25]
    model.student.eval()
    loss = seeded_losses(model, batch)["loss_kd"]
    mixture, images = 0.0, batch["image"].float()
    for name, share, mean, std in zip(TEACHERS, (0.75, 0.25), MEANS, STDS, strict=True):
        normal = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        mixture = mixture + share * (network(name, 32).eval()(normal) / 2).softmax(1)
    student = model.eval()(batch)
    expected = 0.9 * kd_loss(student, 2 * mixture.log(), 2.0)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ON_LOGITS)
def test_two_of_the_same_are_one(name):
    """Whatever the shares: every method on logits takes the average."""
    alone = seeded_losses(build(name), make_batch(), 5)[loss_of(name)]
    model = build(name, "MODEL.TEACHER.SHARES", [1.0, 4.0], teacher=["resnet14", "resnet14"])
    torch.testing.assert_close(seeded_losses(model, make_batch(), 5)[loss_of(name)], alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ON_LOGITS)
def test_every_teacher_counts(name):
    """As much as its share says: with nearly all of it a teacher is alone."""

    def loss(teacher, *opts):
        return seeded_losses(build(name, *opts, teacher=teacher), make_batch(), 5)[loss_of(name)]

    first, second = (loss(teacher) for teacher in TEACHERS)
    mostly = loss(TEACHERS, "MODEL.TEACHER.SHARES", [1e-7, 1.0])
    torch.testing.assert_close(mostly, second, rtol=3e-5, atol=1e-6)
    both = loss(TEACHERS)
    assert not torch.isclose(both, first, rtol=2e-4) and not torch.isclose(both, second, rtol=2e-4)


def test_each_temperature_has_an_average_of_its_own():
    """Parts of a loss at another temperature see the average of the probabilities at that one."""
    student, *logits = (array(seed, 6, CLASSES, scale=5.0) for seed in (1, 2, 3))
    target, shares = torch.arange(6), (0.3, 0.7)
    at = {t: sum(s * (z / t).softmax(1) for s, z in zip(shares, logits, strict=True)).log() * t for t in (1, 2, 3, 4)}
    members = [(share, Outputs(z)) for share, z in zip(shares, logits, strict=True)]
    outputs = Outputs(student), Outputs(members=members)

    def loss(name, **settings):
        opts = [item for setting, value in settings.items() for item in (key(name, setting), value)]
        distiller = build(name, *opts).distillers[name.lower()]
        return distiller(*outputs, Batch(target))

    expected = nkd_loss(student, at[1], target, 0.0, 3.0)
    expected += nkd_loss(student, at[3], target, 2.0, 3.0) - nkd_loss(student, at[3], target, 0.0, 3.0)
    torch.testing.assert_close(loss("NKD", GAMMA=2.0, T=3.0), expected)
    expected = rld_loss(student, at[2], target, 1.5, 0.0, 2.0, 4.0)
    expected += rld_loss(student, at[4], target, 0.0, 3.0, 2.0, 4.0)
    torch.testing.assert_close(loss("RLD", ALPHA=1.5, BETA=3.0, ALPHA_T=2.0, T=4.0), expected)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", ON_FEATURES)
def test_a_method_on_features_looks_at_one(name, number):
    both = build(name, *STATISTICS, key(name, "TEACHER"), number, teacher=TEACHERS)
    statistics = ("MODEL.TEACHER.PIXEL_MEAN", MEANS[number], "MODEL.TEACHER.PIXEL_STD", STDS[number])
    one = build(name, *statistics, teacher=TEACHERS[number])
    for step in range(2):
        losses = [seeded_losses(model, make_batch(seed=step + 1), step=step) for model in (both, one)]
        assert torch.equal(losses[0][loss_of(name)], losses[1][loss_of(name)])
    other = build(name, *STATISTICS, key(name, "TEACHER"), 1 - number, teacher=TEACHERS)
    assert seeded_losses(other, make_batch(seed=1))[loss_of(name)] != seeded_losses(one, make_batch())[loss_of(name)]
    assert not any(n.startswith("teacher") for n in both.state_dict())


@pytest.mark.parametrize("name", ON_FEATURES)
def test_connectors_fit_the_one_that_is_looked_at(name):
    model = build(name, key(name, "TEACHER"), 1, teacher=("resnet14", "wrn_16_2"))
    assert seeded_losses(model, make_batch())[loss_of(name)].isfinite()


def test_a_teacher_that_is_not_there():
    name = ON_FEATURES[0]
    for number in (2, -1):
        with pytest.raises(ConfigError, match=rf"needs teacher {number} \(DISTILL\..*\.TEACHER\), but .* names 2"):
            build(name, key(name, "TEACHER"), number, teacher=TEACHERS)
    with pytest.raises(ConfigError, match="SHARES has 3 entries for 2 teachers"):
        build(name, "MODEL.TEACHER.SHARES", [1.0, 1.0, 1.0], teacher=TEACHERS)
    with pytest.raises(ConfigError, match="SHARES must be positive"):
        build(name, "MODEL.TEACHER.SHARES", [1.0, 0.0], teacher=TEACHERS)


@pytest.mark.parametrize("name", STANDARDIZED)
def test_standardized_logits(name):
    """The switch is the method on logits that are standardized already."""
    student, teacher = (array(seed, 6, CLASSES, scale=5.0) + 3 for seed in (1, 2))
    batch = make_batch(6)

    def loss(switch, prepare):
        distiller = build(name, key(name, "STANDARDIZE"), switch).distillers[name.lower()]
        outputs = [Outputs(prepare(logits)) for logits in (student, teacher)]
        return distiller(*outputs, Batch(batch["label"]))

    standardized = loss(True, lambda logits: logits)
    assert torch.equal(standardized, loss(False, standardize_logits))
    assert not torch.isclose(standardized, loss(False, lambda logits: logits), rtol=1e-3)
    # The students' means and deviations do not count.
    torch.testing.assert_close(loss(True, lambda logits: 7 * logits - 2), standardized, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", STANDARDIZED)
def test_several_teachers_are_standardized_each(name):
    """So that none counts more because its logits are larger."""
    student, *teachers = (array(seed, 6, CLASSES, scale=5.0) for seed in (1, 2, 3))
    batch = make_batch(6)
    distiller = build(name, key(name, "STANDARDIZE"), True).distillers[name.lower()]

    def loss(scale):
        members = [(0.5, Outputs(teachers[0])), (0.5, Outputs(scale * teachers[1]))]
        outputs = Outputs(student), Outputs(members=members)
        return distiller(*outputs, Batch(batch["label"]))

    torch.testing.assert_close(loss(10.0), loss(1.0), rtol=1e-4, atol=1e-6)
    assert DISTILLERS.get(name).common_defaults()["STANDARDIZE"] is False
