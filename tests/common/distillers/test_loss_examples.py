"""Every loss function on inputs so small that its value is derived by hand, in the comment beside it.

Logits are given by the class weights w whose softmax w / sum(w) is wanted. Where an example has two samples or two
maps, they differ, so that a sum cannot pass for a mean.
"""

import math
from math import exp, log, pi, sqrt

import pytest
import torch

from d2distill.common import distillers
from d2distill.common.distillers import (
    at_loss,
    bckd_loss,
    crd_loss,
    cwd_loss,
    dist_loss,
    dkd_loss,
    fitnet_loss,
    hcl_loss,
    kd_loss,
    kdsvd_loss,
    mgd_loss,
    nkd_loss,
    nst_loss,
    ofd_loss,
    ofd_margin,
    pkd_loss,
    pkt_loss,
    rkd_loss,
    rld_loss,
    simkd_loss,
    sp_loss,
    standardize_logits,
    uskd_loss,
    vid_loss,
    wttm_loss,
    zipf_labels,
)

LOG2, LOG3 = log(2), log(3)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def logits(*weights, temperature=1.0):
    """Rows whose softmax at the temperature is proportional to the weights."""
    return temperature * tensor(weights).log()


def image(*rows):
    """A map (1, 1, H, W)."""
    return tensor([[rows]])


def classes(*target):
    return torch.tensor(target)


def check(value, expected, rel=1e-12):
    assert value.shape == () and value.item() == pytest.approx(expected, rel=rel, abs=1e-13)


def test_kd():
    # Teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 log 3/2 + 1/4 log 1/2 = 3/4 log 3 - log 2. The second sample
    # agrees, so the mean halves it; T^2 = 4.
    student = logits([1, 1], [3, 1], temperature=2)
    check(kd_loss(student, logits([3, 1], [3, 1], temperature=2), 2.0), 4 / 2 * (0.75 * LOG3 - LOG2))


def test_dkd():
    # Sample 1, class 0: p = 1/2 in both, so TCKD = 0; among the others the teacher has (2/3, 1/3), the student
    # (1/2, 1/2): NCKD = 2/3 log 4/3 + 1/3 log 2/3 = 5/3 log 2 - log 3.
    # Sample 2, class 1: the others are alike, so NCKD = 0; p = 1/2 in the teacher, 1/4 in the student:
    # TCKD = 1/2 log 2 + 1/2 log 2/3 = log 2 - 1/2 log 3.
    student = logits([2, 1, 1], [3, 2, 3], temperature=2)
    teacher = logits([3, 2, 1], [1, 2, 1], temperature=2)
    value = dkd_loss(student, teacher, classes(0, 1), alpha=3.0, beta=5.0, temperature=2.0)
    check(value, 4 / 2 * (3 * (LOG2 - LOG3 / 2) + 5 * (5 / 3 * LOG2 - LOG3)))
    # Two classes leave one other class, of q = 1: only TCKD remains, here that of (1/4, 3/4) and (1/2, 1/2).
    value = dkd_loss(logits([1, 1]), logits([1, 3]), classes(0), alpha=3.0, beta=5.0, temperature=1.0)
    check(value, 3 * (0.75 * LOG3 - LOG2))


def test_dist():
    # One sample: rows (3, 2, 1) / 6 and (2, 3, 1) / 6 less their mean are (1, 0, -1) / 6 and (0, 1, -1) / 6, of
    # correlation 1/2. Columns of one entry are constant, of correlation 0. T^2 (3 * (1 - 1/2) + 5 * (1 - 0)) = 26.
    student, teacher = logits([3, 2, 1], temperature=2), logits([2, 3, 1], temperature=2)
    check(dist_loss(student, teacher, beta=3.0, gamma=5.0, temperature=2.0), 26, rel=1e-6)
    # Two classes: rows fall in both networks, correlation 1. Column 0 is (.8, .7, .6) and (.7, .8, .6), less the mean
    # (.1, 0, -.1) and (0, .1, -.1), of correlation 1/2; column 1 is its mirror image.
    student, teacher = logits([8, 2], [7, 3], [6, 4]), logits([7, 3], [8, 2], [6, 4])
    check(dist_loss(student, teacher, beta=3.0, gamma=5.0), 5 / 2, rel=1e-5)
    # beta, gamma and T are 1 when nothing is said: row 0 less its mean is reversed, correlation -1.
    check(dist_loss(logits([2, 1]), logits([1, 2])), 2 + 1, rel=1e-6)


def test_nkd():
    # Sample 1, class 0: the teacher's p is 5/10, the student's 2/8: - 1/2 log 1/4 = log 2. The others at T = 2, where
    # weights become their square roots: teacher (2, 1) / 3, student (1, 1) / 2: cross-entropy log 2.
    # Sample 2, class 2: p is 1/2 in both: 1/2 log 2. Teacher and student (2, 1) / 3:
    # - 2/3 log 2/3 - 1/3 log 1/3 = log 3 - 2/3 log 2.
    student, teacher = logits([2, 3, 3], [16, 4, 20]), logits([5, 4, 1], [4, 1, 5])
    value = nkd_loss(student, teacher, classes(0, 2), gamma=3.0, temperature=2.0)
    check(value, (1.5 * LOG2 + 3 * 4 * (LOG2 + LOG3 - 2 / 3 * LOG2)) / 2)
    # Two classes: the only other one has q = 1 and log q = 0.
    check(nkd_loss(logits([1, 3]), logits([1, 1]), classes(0), gamma=3.0, temperature=2.0), 0.5 * log(4))


def test_rld_confidence():
    # The teacher's top class has 3/4 at Ta = 2. Sample 1 is of class 1, which has 1/3 in the student:
    # KL = 3/4 log 9/4 + 1/4 log 3/8 = 7/4 log 3 - 9/4 log 2. Sample 2, of the top class, agrees.
    # No sample has two classes below its own: beta has nothing to weigh.
    student = logits([2, 1], [3, 1], temperature=2)
    teacher = logits([3, 1], [3, 1], temperature=2)
    value = rld_loss(student, teacher, classes(1, 0), alpha=3.0, beta=5.0, alpha_temperature=2.0, temperature=1.0)
    check(value, 3 * 4 / 2 * (7 / 4 * LOG3 - 9 / 4 * LOG2))


def test_rld_correlation():
    # Sample 1, class 0: class 1 ties with it and is left out; below are classes 2 and 3 with (2/3, 1/3) in the teacher
    # and (1/2, 1/2) in the student: KL = 5/3 log 2 - log 3, see test_dkd. Sample 2, class 3, has none below.
    student = logits([1, 9, 5, 5], [1, 2, 3, 4], temperature=2)
    teacher = logits([4, 4, 2, 1], [4, 3, 2, 1], temperature=2)
    value = rld_loss(student, teacher, classes(0, 3), alpha=0.0, beta=5.0, alpha_temperature=1.0, temperature=2.0)
    check(value, 5 * 4 / 2 * (5 / 3 * LOG2 - LOG3))


def test_wttm():
    # p = (9, 1) / 10, p^(1/2) = (3, 1) / sqrt 10: U = 4 / sqrt 10 and p' = (3/4, 1/4). The student has (1/2, 1/2):
    # KL = 3/4 log 3 - log 2, see test_kd. Sample 2: U = 2 / sqrt 2, KL = 1/2 log 2 + 1/2 log 2/3 = log 2 - 1/2 log 3.
    value = wttm_loss(logits([1, 1], [1, 3]), logits([9, 1], [1, 1]), gamma=0.5)
    check(value, (4 / sqrt(10) * (0.75 * LOG3 - LOG2) + sqrt(2) * (LOG2 - LOG3 / 2)) / 2)


def test_bckd():
    # Student 1/4, teacher 1/2: weight 1/4, BCE = - 1/2 log 1/4 - 1/2 log 3/4 = 2 log 2 - 1/2 log 3, whatever the row's
    # class. Of four rows two are foreground (0), one is background (1 of 1 classes), one is ignored (-1).
    student = tensor([[-LOG3], [-LOG3], [-LOG3], [0]]).requires_grad_()
    entropy = 2 * LOG2 - LOG3 / 2
    value = bckd_loss(student, tensor([[0]] * 4), classes(0, 1, -1, 0))
    check(value, 2 * entropy / 4 / 2)
    # The weight has a gradient too: (p_s - p_t) * weight + p_s (1 - p_s) * (-1) * BCE.
    value.backward()
    row = (-1 / 16 - 3 / 16 * entropy) / 2
    assert student.grad[:, 0].tolist() == pytest.approx([row, row, 0, 0])
    # Classes are summed; without foreground the divisor is 1.
    check(bckd_loss(student[:2].reshape(1, 2), tensor([[0, 0]]), classes(2)), 2 * entropy / 4)


def test_standardize():
    # (1, 2, 3): mean 2, unbiased deviation 1. (0, 0, 3): mean 1, variance (1 + 1 + 4) / 2 = 3.
    value = standardize_logits(tensor([[1, 2, 3], [0, 0, 3]]))
    torch.testing.assert_close(value, tensor([[-1, 0, 1], [-1 / sqrt(3), -1 / sqrt(3), 2 / sqrt(3)]]))
    torch.testing.assert_close(standardize_logits(tensor([[1, 2, 3]]), eps=0.5), tensor([[-2 / 3, 0, 2 / 3]]))
    assert (
        not standardize_logits(tensor([[0.1] * 100, [1e4] * 100])).any() and not standardize_logits(tensor([[5]])).any()
    )


def test_zipf_labels():
    # Both logits say the same. Class 1 is ranked second of four: labels 1, 1/3, 1/4 over 19/12. Class 3 is first:
    # 1/4, 1/3, 1/2 over 13/12.
    value = tensor([[3, 2, 1, 0], [0, 1, 2, 3]])
    labels = zipf_labels(value, value, classes(1, 3))
    torch.testing.assert_close(
        labels, tensor([[12, 0, 4, 3], [0, 0, 0, 0]]) / 19 + tensor([[0] * 4, [3, 4, 6, 0]]) / 13
    )


WEAK = logits([2, 1, 1], [2, 1, 1])
USKD_STUDENT = logits([4, 3, 1], [3, 1, 8])


def test_uskd():
    # Class 0 has p = 4/8 and 3/12: squares 1/4 and 1/16, of mean 5/32. Target part, with factors 1 +- 3/32:
    # (35/32 log 1/2 + 29/32 log 1/4) / 2 = - 93/64 log 2.
    check(uskd_loss(USKD_STUDENT, WEAK, classes(0, 0), 1.0, 0.0, 0.0), 93 / 64 * LOG2)
    # Others: sample 1 ranks class 0, 1, 2: labels 1/2 and 1/3, that is (3/5, 2/5), with q = (3/4, 1/4):
    # 3/5 log 3/4 + 2/5 log 1/4 = 3/5 log 3 - 2 log 2.
    # In sample 2 the final logits rank class 2 first, but the weak ones lift class 0 above it, as
    # 1 + log(1/4) / (1 + log 4) = 0.42 > 1/2 + log(2/3) / (1 + log 4) = 0.33: labels 1/2 for class 2, 1/3 for class 1.
    # With q = (1/9, 8/9): 2/5 log 1/9 + 3/5 log 8/9 = 9/5 log 2 - 2 log 3.
    check(uskd_loss(USKD_STUDENT, WEAK, classes(0, 0), 0.0, 1.0, 0.0), (7 / 5 * LOG3 + LOG2 / 5) / 2)
    # Weak: one-hot smoothed by 0.1 is (14/15, 1/30, 1/30): - 14/15 log 1/2 - 2/30 log 1/4 = 16/15 log 2.
    check(uskd_loss(USKD_STUDENT, WEAK, classes(0, 0), 0.0, 0.0, 1.0), 16 / 15 * LOG2)
    value = uskd_loss(USKD_STUDENT, WEAK, classes(0, 0), alpha=2.0, beta=3.0, mu=5.0)
    check(value, 2 * 93 / 64 * LOG2 + 3 * (7 / 5 * LOG3 + LOG2 / 5) / 2 + 5 * 16 / 15 * LOG2)


def test_uskd_target_factor_has_no_gradient():
    # Of sample 1: factor 35/32, half of it by the mean, times p - onehot = (4/8 - 1, 3/8, 1/8).
    student = USKD_STUDENT.clone().requires_grad_()
    uskd_loss(student, WEAK, classes(0, 0), 1.0, 0.0, 0.0).backward()
    assert student.grad[0].tolist() == pytest.approx([35 / 64 * g for g in (-1 / 2, 3 / 8, 1 / 8)])


def test_fitnet():
    # (1^2 + 3^2) / 2.
    check(fitnet_loss(image([1, 3]), image([0, 0])), 5)


def test_simkd():
    # The teacher's larger map is pooled, (1, 3, 2, 4) -> (2, 3): (1^2 + 3^2) / 2.
    check(simkd_loss(image([3, 0]), image([1, 3, 2, 4])), 5)


def test_vid():
    # Channel 1: error 2, variance 2: 4/2 + log 2. Channel 2: error 3, variance 4: 9/4 + 2 log 2. Half of their mean.
    mean, teacher = tensor([2.0, 0]).view(1, 2, 1, 1), tensor([0, 3]).view(1, 2, 1, 1)
    variance = tensor([2, 4]).requires_grad_()
    value = vid_loss(mean, teacher, variance)
    check(value, (17 / 4 + 3 * LOG2) / 4)
    # The variance learns: (1 / var - error^2 / var^2) / 4.
    value.backward()
    assert variance.grad.tolist() == pytest.approx([(1 / 2 - 1) / 4, (1 / 4 - 9 / 16) / 4])


def test_at():
    # |f|^2 of (sqrt 3, -2) is (3, 4), over its norm (3/5, 4/5). Teacher: channels are averaged after the power:
    # ((1 + 1) / 2, 0) -> (1, 0). mean(4/25, 16/25) = 2/5.
    student, teacher = image([sqrt(3), -2]), tensor([[[[1, 0]], [[-1, 0]]]])
    check(at_loss([student], [teacher]), 2 / 5)
    # p = 1: (3, -4) gives (3/5, 4/5). The teacher's larger map is pooled before the power: (9, -1, 3, 3) -> (4, 3).
    check(at_loss([image([3, -4])], [image([9, -1, 3, 3])], p=1), 1 / 25)
    # Maps are added, samples averaged: the second one agrees.
    two = torch.cat([student, image([1, 0])]), torch.cat([image([1, 0])] * 2)
    check(at_loss([student, two[0]], [teacher, two[1]]), 2 / 5 + 1 / 5)


def test_nst():
    # Student channels (1, 0) and (0, 1) once normalized, the teacher's (3, 4) / 5. K(s, s) = (1 + 1 + 0 + 0) / 4,
    # K(t, t) = 1, K(s, t) = (9 + 16) / 25 / 2: 1/2 + 1 - 2 * 1/2 = 1/2.
    student, teacher = tensor([[[[2, 0]], [[0, 3]]]]), image([3, 4])
    check(nst_loss([student], [teacher]), 1 / 2)
    # With more channels than positions the sums are computed another way. (0, 1) twice, and the teacher's three times:
    # K(s, s) = (1 + 4) / 9, K(s, t) = (9 + 16 + 16) / 75: 5/9 + 1 - 82/75 = 104/225.
    wide = torch.cat([student, image([0, 1])], dim=1)
    check(nst_loss([wide], [teacher.expand(1, 3, 1, 2)]), 104 / 225)
    # Maps are added, samples averaged: the second one agrees. A larger map is pooled: (0, 6, 5, 3) -> (3, 4).
    two = torch.cat([student[:, :1], teacher]), torch.cat([image([0, 6, 5, 3])] * 2)
    check(nst_loss([student, two[0]], [teacher, two[1]]), 1 / 2 + (1 + 1 - 2 * 9 / 25) / 2)


def test_sp():
    # Student samples (2, 0) and (0, 1): G = diag(4, 1), rows normalized diag(1, 1). Teacher samples 3 and 4:
    # G = ((9, 12), (12, 16)), rows (3/5, 4/5) twice. (4 + 16 + 9 + 1) / 25 / N^2 = 3/10. A map that agrees adds 0.
    student, teacher = tensor([[2, 0], [0, 1]]).view(2, 1, 1, 2), tensor([3, 4]).view(2, 1, 1, 1)
    check(sp_loss([student], [teacher]), 3 / 10)
    check(sp_loss([student, student, teacher], [teacher, teacher, teacher]), 3 / 5)
    # One sample is similar to itself whatever it is.
    check(sp_loss([student[:1]], [teacher[:1]]), 0)


def rbf(*differences):
    return [exp(-(d**2) / 8) for d in differences]


def squared_error(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def test_kdsvd():
    # A map of one row has one right singular vector. Shallow map: student (3, 4) / 5, teacher (1, 0); deep map: (1, 0)
    # in both. Differences of deep and shallow entries: student 1 - 3/5, 1 - 4/5, 0 - 3/5, 0 - 4/5; teacher 0, 1, 1, 0.
    error = squared_error(rbf(2 / 5, 1 / 5, 3 / 5, 4 / 5), rbf(0, 1, 1, 0))
    row = image([1, 0])
    check(kdsvd_loss([image([3, 4]), 2 * row], [row, row]), error)
    # The student's sign is turned to the teacher's; the larger map is pooled; a sample that agrees halves the loss.
    student = [
        torch.cat([image([-3, -4]), row]),
        torch.cat([image([2, 0, 1, -1]), row.repeat(1, 1, 1, 2)[..., [0, 0, 1, 1]]]),
    ]
    check(kdsvd_loss(student, [row.expand(2, 1, 1, 2)] * 2), error / 2)
    # A third map is compared with the second.
    check(kdsvd_loss([row, image([3, 4]), row], [row] * 3), 2 * error)


def test_kdsvd_looks_for_the_teachers_vector_among_k_and_three_of_the_student():
    # The student's vectors are the axes, in order. Its fourth is the teacher's; its fifth is not looked at.
    first, *_, fourth, fifth = (image(row.tolist()) for row in torch.eye(5))
    student = [tensor([5, 4, 3, 2, 1]).diag().view(1, 5, 1, 5), first]
    check(kdsvd_loss(student, [fourth, first]), 0)
    assert kdsvd_loss(student, [fifth, first]) > 0


def test_kdsvd_of_two_vectors():
    # Teacher diag(4, 3): vectors (1, 0) and (0, 1), weighted by 4/5 and 3/5. Student, shallow: (3, 4) / 5 with value 2,
    # (-4, 3) / 5 with value 1. Nearest to (1, 0) is the second one turned, (4, -3) / 5; to (0, 1) the first. With the
    # teacher's weights: (16, -12) / 25 and (9, 12) / 25. Student, deep: (0, 1) leads, which changes nothing.
    teacher = image([4, 0], [0, 3])
    student = [image([6 / 5, 8 / 5], [-4 / 5, 3 / 5]), image([1, 0], [0, 5])]
    first = squared_error(rbf(0.8 - 0.64, 0.8 + 0.48, 0.64, 0.48), rbf(0, 0.8, 0.8, 0))
    second = squared_error(rbf(0.36, 0.48, 0.6 - 0.36, 0.6 - 0.48), rbf(0, 0.6, 0.6, 0))
    check(kdsvd_loss(student, [teacher, teacher], k=2), first + second)
    # Where one of the maps is a column, it has one vector, 1, for both; the sign of a teacher's vectors is free.
    student = [image([1], [1]), student[0]]
    expected = [squared_error(rbf(0.64 - v, 0.48 + v), rbf(0.8 - v, v)) for v in (1, -1)]
    assert kdsvd_loss(student, [image([1], [2]), teacher], k=2).item() in [pytest.approx(e) for e in expected]
    # Equal singular values have no vectors of their own: no gradient, where 1 / 0 would be one.
    degenerate = image([1, 0], [0, 1]).requires_grad_()
    kdsvd_loss([degenerate, image([3, 4], [0, 1])], [teacher, teacher]).backward()
    assert degenerate.grad.isfinite().all()


def test_hcl():
    # A pixel of 64 in 8 x 8: MSE 64^2 / 64; pooled to 4 x 4 it is 16: 16^2 / 16; to 2 x 2, 4^2 / 4; to 1 x 1, 1.
    # (64 + 16/2 + 4/4 + 1/8) / (15/8) = 39.
    one = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    one[0, 0, 0, 0] = 64
    check(hcl_loss([one], [torch.zeros(1, 1, 8, 8)]), 39)
    # 2 x 2 has a smaller grid of 1 x 1 only: (3 + 1/2 * 1) / (3/2); 1 x 2 has none: (9 + 1) / 2.
    student, wide = image([1, -1], [1, 3]), image([3, -1])
    check(hcl_loss([student, wide], [torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 2)]), 7 / 3 + 5)
    # The larger map is pooled to the smaller; samples and channels are averaged.
    student = tensor([[6, 2], [0, 0]]).view(2, 2, 1, 1)
    check(hcl_loss([student], [torch.tensor([1.0, 3]).expand(2, 2, 1, 2)]), (16 + 0 + 4 + 4) / 4)


def test_pkt():
    # Student orthogonal: (cos + 1) / 2 = (1, 1/2), p = (2/3, 1/3). Teacher opposite: (1, 0), q = (1, 0).
    # Two rows of 1 * log 3/2, over 4 entries.
    student, teacher = tensor([[2, 0], [0, 1]]), tensor([[1], [-3]])
    check(pkt_loss(student, teacher), log(3 / 2) / 2, rel=1e-5)
    # eps = 1: student (1/2, 0) and (0, 1/2), (cos + 1) / 2 = (5/8, 1/2), p = (5/9, 4/9); teacher 1/2 twice, q = 1/2.
    # Rows of 1/2 log((3/2) / (14/9)) + 1/2 log((3/2) / (13/9)) = 1/2 log(729 / 728).
    check(pkt_loss(tensor([[1, 0], [0, 1]]), tensor([[1], [1]]), eps=1.0), log(729 / 728) / 4, rel=1e-9)


def test_rkd():
    # Student 0, 1, -1: distances 1, 1, 2 of mean 4/3: 3/4, 3/4, 3/2. Teacher 0, 1, 2: 1, 2, 1: 3/4, 3/2, 3/4.
    # Two of three differ by 3/4: 9/32 each, in both directions, over 9 pairs: 1/8.
    # Angles at 0: cos -1 and 1; at 1: 1 and -1; at 2 both 1. smooth L1(2) = 3/2, both orders, over 27: 2/9.
    student, teacher = tensor([[0], [1], [-1]]), tensor([[0], [1], [2]])
    check(rkd_loss(student, teacher), 25 / 8 + 50 * 2 / 9)
    check(rkd_loss(student, teacher, distance_weight=2, angle_weight=3), 2 / 8 + 3 * 2 / 9)
    # Squared: 1, 1, 4 of mean 2: 1/2, 1/2, 2; teacher 1/2, 2, 1/2. Two differ by 3/2: smooth L1 is 1.
    check(rkd_loss(student, teacher, 1, 0, squared=True), 4 / 9)
    # A right angle: cos 0 at 0 and 1/sqrt 2 at the others, against -1 and 1: 1/2 and (1 - 1/sqrt 2)^2 / 2 twice.
    corner = tensor([[0, 0], [5, 0], [0, 5]])
    check(rkd_loss(student, corner, 0, 1), (1 + 2 * (1 - 1 / sqrt(2)) ** 2) / 27)
    # eps = 1/4 bounds squared distances: 0, 0, 1 are at 1/2, 1, 1 of mean 5/6: 3/5, 6/5, 6/5 against 3/4, 3/4, 3/2.
    value = rkd_loss(tensor([[0], [0], [1]]), student, 1, 0, eps=0.25)
    check(value, (0.15**2 + 0.45**2 + 0.3**2) / 9)


def test_pkd():
    # Over samples and space the student has (0, 0, 2, 2) and the teacher (0, 2, 0, 2): deviation 2 / sqrt 3, so n is
    # +- sqrt(3) / 2, and differs by sqrt 3 in two of four: 6 / 4 / 2 = 3/4. The second channel agrees: half of it.
    same = tensor([5, 6, 5, 5]).view(2, 1, 1, 2)
    student, teacher = tensor([0, 0, 2, 2]).view(2, 1, 1, 2), tensor([0, 2, 0, 2]).view(2, 1, 1, 2)
    check(pkd_loss([torch.cat([student, same], 1)], [torch.cat([teacher, same], 1)]), 3 / 8, rel=1e-5)
    # Levels are added. A constant channel becomes 0: 4 * 3/4 / 4 / 2 remain.
    check(pkd_loss([student, 0 * student + 0.1], [teacher, teacher]), 3 / 4 + 3 / 8, rel=1e-5)
    # The deviation is 2 / sqrt 3 and eps 1e-6 beside it: first order 2 * eps / deviation.
    assert pkd_loss([student], [teacher]).item() - 3 / 4 == pytest.approx(-0.75 * 2e-6 * sqrt(3) / 2, rel=1e-3)


def test_cwd():
    # Over the two positions of a channel (3/4, 1/4) and (1/2, 1/2): KL = 3/4 log 3 - log 2, see test_kd. Of two
    # samples with two channels one channel differs: a quarter; T^2 = 4.
    teacher = logits([3, 1], temperature=2).expand(2, 2, 1, 2)
    student = teacher.clone()
    student[0, 0] = 0
    check(cwd_loss([student], [teacher], 2.0), 4 / 4 * (0.75 * LOG3 - LOG2))
    # T is 1 when nothing is said; levels are added: KL from (1/2, 1/2) to (3/4, 1/4) is log 2 - 1/2 log 3.
    value = cwd_loss([image([0, 0]), image([LOG3, 0])], [image([LOG3, 0]), image([0, 0])])
    check(value, 0.75 * LOG3 - LOG2 + LOG2 - LOG3 / 2)


def test_mgd():
    # (1 + 4 + 9) / 2 samples; positions and channels are summed. Levels are added.
    student = tensor([[1, 2], [0, 3]]).view(2, 2, 1, 1)
    check(mgd_loss([student, student], [0 * student, student + 1]), 7 + 2)


@pytest.mark.parametrize("loss", [pkd_loss, cwd_loss, mgd_loss])
def test_levels_meet_at_the_deep_end_in_the_teacher_s_size(loss):
    # (0, 4), twice as wide with half-pixel centers, is (0, 1, 3, 4). The teacher's shallow map has no partner.
    check(loss([image([0, 4])], [image([7, 9]), image([0, 1, 3, 4])]), 0)


def test_ofd():
    # Margin -1. Student and teacher, pixel by pixel: (0, 2): 4; (-1, -1/2): below a negative target, 0;
    # (1/2, -1/2): 1; (0, -3 -> -1): 1; (-2, -3): 0. The sum over pixels is 6, over two samples 3.
    student, teacher = image([0, -1, 0.5, 0, -2]), image([2, -0.5, -0.5, -3, -3])
    two = torch.cat([student, teacher.relu()]), torch.cat([teacher, teacher.relu()])
    check(ofd_loss([two[0]], [two[1]], [tensor([-1])]), 3)
    # Of three maps the first counts 1/4, the second 1/2. A larger teacher map is pooled, (1, 3) -> 2, and a smaller one
    # is repeated.
    maps = [student, image([0]), image([1, 2, 0, 4])], [teacher, image([1, 3]), image([2])]
    check(ofd_loss(*maps, [tensor([-1])] * 3), 6 / 4 + 4 / 2 + (1 + 0 + 4 + 4))
    # A margin per channel: targets max(-3, -1) and max(-3, -2), the student at 0.
    value = ofd_loss([torch.zeros(1, 2, 1, 1)], [torch.full((1, 2, 1, 1), -3.0)], [torch.tensor([-1.0, -2.0])])
    check(value, 1 + 4)


def test_ofd_margin():
    # E[x | x < 0] of N(0, s^2) is -s sqrt(2 / pi); of N(1, 1) it is 1 - density(-1) / P(x < 0) with
    # P = erfc(1 / sqrt 2) / 2; of N(5, 1) hardly anything is negative: -3 s. Without deviation it is the bias or 0.
    margins = ofd_margin(tensor([2, -2, 1, 1, -2, 0, 0]), tensor([0, 0, 1, 5, 10, -0.5, 0.5]))
    one = 1 - exp(-1 / 2) / sqrt(2 * pi) / (math.erfc(1 / sqrt(2)) / 2)
    half_normal = -2 * sqrt(2 / pi)
    assert margins.tolist() == pytest.approx([half_normal, half_normal, one, -3, -6, -0.5, 0])
    # P(x < 0) of N(3, 1) is 1.35e-3 and counts; that of N(3.2, 1) is 0.7e-3.
    close = 3 - exp(-9 / 2) / sqrt(2 * pi) / (math.erfc(3 / sqrt(2)) / 2)
    assert ofd_margin(tensor([1, 1]), tensor([3, 3.2])).tolist() == pytest.approx([close, -3])


def test_crd():
    # c = K / num_samples = 2/4. Sample 1: P+ = 1/2: log 1/2; negatives 1/2 and 3/2: log 1/2 + log 1/4. Sample 2:
    # P+ = 3/2: log 3/4; negatives 1/2 twice: 2 log 1/2. Minus the mean: (4 log 2 + 4 log 2 - log 3) / 2.
    scores = tensor([[0.5, 0.5, 1.5], [1.5, 0.5, 0.5]]).log()
    check(crd_loss(scores, num_samples=4), 4 * LOG2 - LOG3 / 2, rel=1e-6)
    # eps = 1/2 with P = 1 throughout: 1 / (1 + 1/2 + 1/2), and 1/2 / (1 + 1/2 + 1/2) twice.
    check(crd_loss(tensor([[0, 0, 0]]), num_samples=4, eps=0.5), 5 * LOG2)


ONE_CLASS, ONE_TARGET = torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)
MAP = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dkd_loss", (ONE_CLASS, ONE_CLASS, ONE_TARGET, 1.0, 8.0, 4.0), "other classes"),
        ("nkd_loss", (ONE_CLASS, ONE_CLASS, ONE_TARGET, 1.0, 4.0), "other classes"),
        ("rld_loss", (ONE_CLASS, ONE_CLASS, ONE_TARGET, 1.0, 8.0, 1.0, 4.0), "other classes"),
        ("uskd_loss", (ONE_CLASS, ONE_CLASS, ONE_TARGET, 1.0, 0.1, 0.005), "other classes"),
        ("uskd_loss", (torch.zeros(4, 3), torch.zeros(2, 3), ONE_TARGET, 1.0, 0.1, 0.005), "feature of its own"),
        ("kdsvd_loss", ([MAP], [MAP]), "two or more"),
        *[(f"{name}_loss", ([MAP] * 3, [MAP] * 2), r"zip\(\)") for name in ("at", "nst", "sp", "kdsvd", "hcl")],
        ("ofd_loss", ([MAP] * 3, [MAP] * 2, [torch.zeros(3)] * 2), r"zip\(\)"),
        *[(f"{name}_loss", ([MAP], [MAP[:, :2]]), "channels") for name in ("pkd", "cwd", "mgd")],
        *[(f"{name}_loss", ([], [MAP]), "no feature maps") for name in ("pkd", "cwd", "mgd")],
    ],
)
def test_inputs_that_do_not_fit(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(distillers, name)(*arguments)
