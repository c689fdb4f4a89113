"""Loss functions on feature maps and embeddings: values against the formulas and the reference, identities."""

import pytest
import torch

from d2distill.common.distillers import (
    at_loss,
    fitnet_loss,
    hcl_loss,
    kdsvd_loss,
    nst_loss,
    ofd_loss,
    pkt_loss,
    rkd_loss,
    sp_loss,
    vid_loss,
)
from tests.common.distillers import formulas
from tests.goldens.fill import array

SQUARE = [(4, 6, 6), (6, 4, 4), (8, 2, 2)]
# Larger on one side, on the other, along one axis each; none square.
UNEQUAL = [(4, 5, 7), (6, 3, 4), (8, 4, 2)], [(3, 4, 6), (7, 6, 4), (5, 2, 5)]


def maps(seed, shapes, batch=3, dtype=torch.float64):
    return [(array(seed + i, batch, *shape).relu() + 0.01).to(dtype) for i, shape in enumerate(shapes)]


def golden_maps(seed, *shapes):
    return [array(seed + i, 4, *shape) for i, shape in enumerate(shapes)]


def ofd(feats_student, feats_teacher):
    return ofd_loss(feats_student, feats_teacher, [torch.full((t.shape[1],), -0.3) for t in feats_teacher])


def ofd_formula(feats_student, feats_teacher):
    return formulas.ofd(feats_student, feats_teacher, [torch.full((t.shape[1],), -0.3) for t in feats_teacher])


@pytest.mark.parametrize("shapes", [(SQUARE, SQUARE), UNEQUAL], ids=["square", "unequal"])
@pytest.mark.parametrize(
    ("loss", "formula"),
    [(at_loss, formulas.at), (nst_loss, formulas.nst), (sp_loss, formulas.sp), (kdsvd_loss, formulas.kdsvd)],
)
def test_map_losses_equal_the_formula(loss, formula, shapes):
    student, teacher = maps(100, shapes[0]), maps(110, shapes[1])
    expected = formula(student, teacher)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-10)
    fp32 = loss([s.float() for s in student], [t.float() for t in teacher])
    assert fp32.dtype == torch.float32 and fp32.item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("shapes", [SQUARE, [(4, 9, 5), (6, 3, 7), (8, 1, 1)]], ids=["square", "unequal"])
@pytest.mark.parametrize(("loss", "formula"), [(hcl_loss, formulas.hcl), (ofd, ofd_formula)])
def test_losses_on_equal_channels_equal_the_formula(loss, formula, shapes):
    student = [array(120 + i, 3, *shape).double() for i, shape in enumerate(shapes)]
    teacher = [array(130 + i, 3, c, h + 1, w).double() for i, (c, h, w) in enumerate(shapes)]
    assert loss(student, teacher).item() == pytest.approx(formula(student, teacher), rel=1e-10)


def test_a_smaller_teacher_map_is_repeated_for_every_pixel_of_the_student():
    student, teacher = array(120, 2, 4, 6, 6).double(), array(130, 2, 4, 3, 2).double()
    whole = teacher.repeat_interleave(2, 2).repeat_interleave(3, 3)
    assert ofd([student], [teacher]).item() == pytest.approx(ofd([student], [whole]).item(), rel=1e-12)


@pytest.mark.parametrize("p", [1, 3, 4])
def test_attention_of_other_powers(p):
    student, teacher = ([x - 0.5 for x in maps(seed, SQUARE)] for seed in (100, 110))
    assert at_loss(student, teacher, p).item() == pytest.approx(formulas.at(student, teacher, p), rel=1e-10)


@pytest.mark.parametrize("k", [2, 3, 9])
def test_several_singular_vectors(k):
    # 9 is more than any of the maps has, k + 3 more than the last has in all cases.
    student, teacher = maps(140, SQUARE), maps(150, SQUARE)
    expected = formulas.kdsvd(student, teacher, k)
    assert kdsvd_loss(student, teacher, k).item() == pytest.approx(expected, rel=1e-10)


def test_embedding_losses_equal_the_formula():
    student, teacher = array(50, 6, 5).double(), array(51, 6, 9).double()
    assert pkt_loss(student, teacher).item() == pytest.approx(formulas.pkt(student, teacher), rel=1e-9)
    assert pkt_loss(student, teacher, 1e-2).item() == pytest.approx(formulas.pkt(student, teacher, 1e-2), rel=1e-9)
    assert rkd_loss(student, teacher).item() == pytest.approx(formulas.rkd(student, teacher), rel=1e-9)
    expected = formulas.rkd(student, teacher, 2, 3, squared=True)
    assert rkd_loss(student, teacher, 2, 3, squared=True).item() == pytest.approx(expected, rel=1e-9)


def test_predicted_gaussian_equals_the_formula():
    mean, teacher = array(160, 2, 3, 4, 5).double(), array(161, 2, 3, 4, 5).double()
    variance = torch.tensor([0.1, 1, 5])
    assert vid_loss(mean, teacher, variance).item() == pytest.approx(formulas.vid(mean, teacher, variance), rel=1e-6)


def test_hint_is_a_mean_squared_error():
    student, teacher = array(162, 2, 3, 4, 5).double(), array(163, 2, 3, 4, 5).double()
    expected = sum(v**2 for v in (student - teacher).flatten().tolist()) / 120
    assert fitnet_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


STUDENT_SHAPES = [(8, 16, 16), (16, 8, 8), (32, 4, 4)]


def positive(feats):
    return [feat.relu() + 0.01 for feat in feats]


# The reference computes in fp32. Where the loss is a difference of nearly equal numbers its own rounding shows:
# in float64 the formula is 9e-6 (sp) and 5e-6 (pkt) away from the golden.
@pytest.mark.parametrize(
    ("golden", "loss", "teacher", "rel", "rel_grad"),
    [
        ("at_p2", at_loss, positive(golden_maps(33, (8, 8, 8), (24, 8, 8), (32, 8, 8))), 2e-6, 1e-6),
        ("sp", sp_loss, positive(golden_maps(33, (8, 8, 8), (24, 8, 8), (32, 8, 8))), 1.5e-5, 1e-4),
        ("nst", nst_loss, positive(golden_maps(36, (8, 8, 8), (16, 8, 8), (32, 8, 8))), 2e-6, 2e-6),
        ("kdsvd", kdsvd_loss, positive(golden_maps(39, *STUDENT_SHAPES)), 5e-6, 1e-5),
        ("hcl", hcl_loss, golden_maps(60, *STUDENT_SHAPES), 2e-6, 1e-6),
    ],
)
def test_map_losses_equal_the_reference(loss_goldens, golden, loss, teacher, rel, rel_grad):
    student = [feat.requires_grad_() for feat in positive(golden_maps(30, *STUDENT_SHAPES))]
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(loss_goldens[golden]["loss"], rel=rel)
    assert [feat.grad.norm().item() for feat in student] == pytest.approx(loss_goldens[golden]["grad"], rel=rel_grad)


@pytest.mark.parametrize(("golden", "loss", "rel"), [("pkt", pkt_loss, 1e-5), ("rkd", rkd_loss, 2e-6)])
def test_embedding_losses_equal_the_reference(loss_goldens, golden, loss, rel):
    student = array(50, 8, 64).requires_grad_()
    value = loss(student, array(51, 8, 128))
    value.backward()
    assert value.item() == pytest.approx(loss_goldens[golden]["loss"], rel=rel)
    assert student.grad.norm().item() == pytest.approx(loss_goldens[golden]["grad"][0], rel=1e-6)


@pytest.mark.parametrize("loss", [at_loss, nst_loss, sp_loss, kdsvd_loss])
def test_a_factor_per_network_changes_nothing(loss):
    student, teacher = maps(170, SQUARE), maps(180, SQUARE)
    scaled = loss([7 * s for s in student], [0.2 * t for t in teacher])
    assert scaled.item() == pytest.approx(loss(student, teacher).item(), rel=1e-9)


def test_embeddings_may_be_scaled_and_shifted():
    student, teacher = array(50, 8, 6).double(), array(51, 8, 9).double()
    assert pkt_loss(7 * student, 9 * teacher).item() == pytest.approx(pkt_loss(student, teacher).item(), rel=1e-5)
    moved = rkd_loss(7 * student + 100, 0.2 * teacher - 50)
    assert moved.item() == pytest.approx(rkd_loss(student, teacher).item(), rel=1e-9)


def test_relations_of_neighbours_far_from_the_origin():
    """|a|^2 + |b|^2 - 2ab would have no digit left in fp32."""
    student, teacher = array(50, 8, 6), array(51, 8, 6)
    offset = 2.0**13  # a power of two above the data leaves 10 bits of each number
    rounded = (student + offset) - offset
    assert rkd_loss(student + offset, teacher).item() == pytest.approx(rkd_loss(rounded, teacher).item(), rel=1e-5)


@pytest.mark.parametrize("few_positions", [False, True])
def test_both_ways_to_the_kernel_means(few_positions):
    shapes = [(5, 2, 2)] if few_positions else [(5, 3, 3)]
    student, teacher = maps(190, shapes), maps(191, [(7, *shapes[0][1:])])
    assert nst_loss(student, teacher).item() == pytest.approx(formulas.nst(student, teacher), rel=1e-10)


@pytest.mark.parametrize("loss", [at_loss, nst_loss, sp_loss, kdsvd_loss, hcl_loss, ofd])
def test_lists_of_different_length_are_refused(loss):
    with pytest.raises(ValueError, match=r"zip\(\)"):
        loss(maps(1, SQUARE), maps(1, SQUARE[:2]))


def test_one_map_has_no_neighbour():
    with pytest.raises(ValueError, match="two or more"):
        kdsvd_loss(maps(1, SQUARE[:1]), maps(1, SQUARE[:1]))
