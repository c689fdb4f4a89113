"""What holds for every loss function: one table of them, each property once.

A new loss function is one row of `LOSSES`. What its values are is in test_loss_examples.py. Which property does not
hold for which function, and why, is in `DOES_NOT_HOLD`.
"""

import math
import re
from collections.abc import Callable
from itertools import chain, cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from d2distill.common import distillers as d
from tests.goldens.fill import array


class Loss(NamedTuple):
    #: Of lists of tensors, which are the student's (they learn) and the teacher's (they do not), and of the target.
    function: Callable[[list[Tensor], list[Tensor], Tensor], Tensor]
    #: Shapes of one sample's tensors: a letter for each axis, the same where sizes must be equal.
    student: list[str]
    teacher: list[str]


def ofd(student, teacher, target):
    return d.ofd_loss(student, teacher, [s.new_full((s.shape[1],), -0.25) for s in student])


def vid(student, teacher, target):
    return d.vid_loss(*student, *teacher, student[0].new_full((student[0].shape[1],), 5.0))


def standardize(student, teacher, target):
    z = d.standardize_logits(*student)
    return (z * torch.arange(z.shape[1])).sum()


#: In tests by example. The teacher's maps: more channels and a smaller one; fewer channels and a larger one.
SIZES = {"C": 10, "E": 6, "F": 9, "K": 8} | dict(zip("ahwbij", (3, 4, 4, 5, 2, 3), strict=True))
SIZES |= dict(zip("cklemn", (4, 2, 4, 2, 4, 5), strict=True))
LOGITS, EMBEDDINGS, MAP = (["C"], ["C"]), (["E"], ["F"]), (["ahw"], ["ahw"])
MAPS, EQUAL = (["ahw", "bij"], ["ckl", "emn"]), (["ahw", "bij"],) * 2
#: The student's map may have another size than the teacher's, which has the same channels.
RESIZED = ["ahw", "bij"], ["akl", "bmn"]
LOSSES = {
    "kd": Loss(lambda s, t, y: d.kd_loss(*s, *t, 4.0), *LOGITS),
    "dkd": Loss(lambda s, t, y: d.dkd_loss(*s, *t, y, 1.0, 8.0, 4.0), *LOGITS),
    "dist": Loss(lambda s, t, y: d.dist_loss(*s, *t, 1.5, 0.5), *LOGITS),
    "nkd": Loss(lambda s, t, y: d.nkd_loss(*s, *t, y, 3.5, 3.0), *LOGITS),
    "rld": Loss(lambda s, t, y: d.rld_loss(*s, *t, y, 1.5, 8.0, 2.0, 4.0), *LOGITS),
    "wttm": Loss(lambda s, t, y: d.wttm_loss(*s, *t, 0.1), *LOGITS),
    "bckd": Loss(lambda s, t, y: d.bckd_loss(*s, *t, y), *LOGITS),
    "uskd": Loss(lambda s, t, y: d.uskd_loss(*s, y, 1.0, 0.1, 0.005), ["C", "C"], []),
    "standardize": Loss(standardize, ["C"], []),
    "crd": Loss(lambda s, t, y: d.crd_loss(*s, 40), ["K"], []),
    "at": Loss(lambda s, t, y: d.at_loss(s, t), *MAPS),
    "nst": Loss(lambda s, t, y: d.nst_loss(s, t), *MAPS),
    "sp": Loss(lambda s, t, y: d.sp_loss(s, t), *MAPS),
    "kdsvd": Loss(lambda s, t, y: d.kdsvd_loss(s, t), *MAPS),
    "hcl": Loss(lambda s, t, y: d.hcl_loss(s, t), *RESIZED),
    "ofd": Loss(ofd, *RESIZED),
    "pkd": Loss(lambda s, t, y: d.pkd_loss(s, t), *EQUAL),
    "cwd": Loss(lambda s, t, y: d.cwd_loss(s, t), *RESIZED),
    "mgd": Loss(lambda s, t, y: d.mgd_loss(s, t), *RESIZED),
    "fitnet": Loss(lambda s, t, y: d.fitnet_loss(*s, *t), *MAP),
    "simkd": Loss(lambda s, t, y: d.simkd_loss(*s, *t), ["ahw"], ["akl"]),
    "vid": Loss(vid, *MAP),
    "pkt": Loss(lambda s, t, y: d.pkt_loss(*s, *t), *EMBEDDINGS),
    "rkd": Loss(lambda s, t, y: d.rkd_loss(*s, *t), *EMBEDDINGS),
}
WITH_TEACHER = [name for name, loss in LOSSES.items() if loss.teacher]
ON_LOGITS = [name for name, loss in LOSSES.items() if loss.student[0] == "C"]
#: By property the functions for which it does not hold. It does for all others: of those on logits where it is one of
#: logits, of those with a teacher where it is about the teacher.
DOES_NOT_HOLD = {
    "a batch is the mean of its samples": {
        "sp": "compares the samples of a batch with each other",
        "pkt": "the same",
        "rkd": "the same",
        "dist": "compares each class over the batch",
        "pkd": "standardizes each channel over the batch",
        "uskd": "takes the mean of p[y]^2 over the batch from that of a sample",
        "bckd": "is divided by the number of rows that have an object",
        "standardize": "is no loss: the test takes a sum of the standardized logits",
    },
    "the order of the classes does not matter": {
        "standardize": "is no loss: the test weighs classes by their position",
        "uskd": "ranks the classes: of two with the same logit the first has the better rank",
    },
    "a number added to all logits of a sample does not matter": {
        "bckd": "compares sigmoids, for which 0 is a threshold",
    },
    "no student has less than the teacher itself": {
        "nkd": "has the target's cross-entropy: the least is where the student gives it all probability",
        "rld": "takes the teacher's confidence to the right class where the teacher is wrong",
        "wttm": "compares with the softened teacher: the least is at gamma times its logits",
        "dist": "adds 1e-8 to the product of norms: a column of tiny probabilities agrees better with larger ones",
    },
}
ROOT = Path(__file__).resolve().parents[3]
SQUARES = ["hcl", "ofd", "mgd", "fitnet", "simkd", "vid"]
FORMATS = [torch.float32, torch.bfloat16, torch.float16]


def each(names=LOSSES):
    return pytest.mark.parametrize("name", list(names))


def holding(what, names=LOSSES):
    return pytest.mark.parametrize("name", [name for name in names if name not in DOES_NOT_HOLD[what]])


def tensors(seed, shapes, n=4, scale=1.0, dtype=torch.float64):
    sizes = [[SIZES[axis] for axis in shape] for shape in shapes]
    return [array(seed + i, n, *shape, scale=scale).to(dtype) for i, shape in enumerate(sizes)]


def inputs(name, n=4, **kwargs):
    loss = LOSSES[name]
    student, teacher = tensors(10, loss.student, n, **kwargs), tensors(20, loss.teacher, n, **kwargs)
    return [s.requires_grad_() for s in student], teacher, torch.tensor([3, 0, 9, 3])[:n]


def run(name, *arguments):
    """The loss with its gradients."""
    value = LOSSES[name].function(*arguments)
    assert value.shape == ()
    return value, torch.autograd.grad(value, arguments[0])


def test_every_loss_function_has_its_row():
    assert {name for name in d.__all__ if name.endswith("_loss")} <= {f"{name}_loss" for name in LOSSES}


def test_the_page_names_what_does_not_hold():
    page = (ROOT / "docs" / "reliability.md").read_text()
    for what, names in DOES_NOT_HOLD.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {what.capitalize()} |")]
        assert {*re.findall(r"`(\w+)`", row)} == {*names} - {"standardize"}


@each()
def test_gradcheck(name):
    student, teacher, target = inputs(name)
    function = LOSSES[name].function
    if name == "uskd":  # the factor of its first part has no gradient, see test_loss_examples.py
        function = lambda s, t, y: d.uskd_loss(*s, y, 0.0, 0.1, 0.5)  # noqa: E731
    # fast_mode: along one random direction, which every wrong entry shows in.
    assert torch.autograd.gradcheck(
        lambda *s: function(s, teacher, target), student, fast_mode=True, check_undefined_grad=False
    )


@each(WITH_TEACHER)
def test_no_gradient_to_the_teacher(name):
    student, teacher, target = inputs(name)
    LOSSES[name].function(student, [t.requires_grad_() for t in teacher], target).backward()
    assert all(t.grad is None for t in teacher) and all(s.grad.any() for s in student)


@each()
def test_inputs_are_not_modified(name):
    used, fresh = inputs(name), inputs(name)
    run(name, *used)
    assert all(torch.equal(a, b) for a, b in zip([*used[0], *used[1]], [*fresh[0], *fresh[1]], strict=True))


@each(sorted({*WITH_TEACHER} - {"nkd", "rld", "wttm", "vid"}))
def test_zero_where_both_agree(name):
    student, _, target = inputs(name)
    value, grads = run(name, student, [s.detach().clone() for s in student], target)
    assert value.item() == pytest.approx(0, abs=5e-5) and all(grad.abs().max() < 1e-5 for grad in grads)


@each()
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dtype", FORMATS)
def test_huge_inputs_have_finite_losses_and_gradients(name, n, dtype):
    student, teacher, target = inputs(name, n, scale=1e4)
    if name in ON_LOGITS:  # logits: all of them huge; a single sample with two classes
        student, teacher = ([1e4 * x[:, : 2 if n == 1 else 10].sign() for x in part] for part in (student, teacher))
        target = target.clamp(max=1)
    student, teacher = [s.detach().to(dtype).requires_grad_() for s in student], [t.to(dtype) for t in teacher]
    plain = LOSSES[name].function(student, teacher, target)
    for autocast in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", autocast):
            value = LOSSES[name].function(student, teacher, target)
        assert torch.equal(value, plain), "autocast changed a digit"
    # Losses that grow with the square have weights below 1: without, their gradients do not fit fp16.
    (value * (1e-4 if name in SQUARES else 1)).backward()
    assert value.dtype == torch.float32 and value.isfinite() and all(s.grad.isfinite().all() for s in student)


@each()
def test_half_precision_costs_only_the_input_its_digits(name):
    student, teacher, target = inputs(name, dtype=torch.bfloat16)
    exact = LOSSES[name].function([s.double() for s in student], [t.double() for t in teacher], target)
    value = LOSSES[name].function(student, teacher, target)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-6)


@each()
@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_constant_inputs(name, constant):
    """Dead maps, equal logits: finite, and no gradient that would throw a student off."""
    student, teacher, target = inputs(name, dtype=torch.float32)
    student, teacher = ([torch.full_like(x, constant) for x in part] for part in (student, teacher))
    value, grads = run(name, [s.requires_grad_() for s in student], teacher, target)
    assert value.isfinite() and all(grad.isfinite().all() and grad.abs().max() < 1e3 for grad in grads)
    # One dead sample and, in maps, one dead channel, beside live ones.
    student, teacher, target = inputs(name, dtype=torch.float32)
    student, teacher = [s.detach() for s in student], [*teacher]
    for x in (*student, *teacher):
        x[1], x[:, 1] = constant, constant
    value, grads = run(name, [s.requires_grad_() for s in student], teacher, target)
    bound = 1e7 if name == "pkt" else 1e3  # 1 / eps by its definition
    assert value.isfinite() and all(grad.isfinite().all() and grad.abs().max() < bound for grad in grads)


@each()
def test_no_shape_depends_on_the_data(name):
    """Nor does any branch: boolean masks, `item()` and `if tensor:` wait for the device on CUDA. Fake tensors have no
    data, and raise."""
    with FakeTensorMode() as mode:
        student, teacher, target = inputs(name)
        student, teacher = ([mode.from_tensor(x.detach()) for x in part] for part in (student, teacher))
        value, grads = run(name, [s.requires_grad_() for s in student], teacher, mode.from_tensor(target))
        assert isinstance(value, FakeTensor) and all(isinstance(grad, FakeTensor) for grad in grads)


@each(WITH_TEACHER)
def test_it_matters_which_sample_is_compared_with_which(name):
    student, teacher, target = inputs(name)
    value = LOSSES[name].function(student, teacher, target).item()
    assert LOSSES[name].function([s[[2, 0, 3, 1]] for s in student], teacher, target).item() != approx(value)


def test_order_of_the_classes_without_ties():
    student, teacher, target = inputs("uskd")
    order = torch.tensor([4, 9, 2, 7, 1, 0, 3, 8, 6, 5])
    value = LOSSES["uskd"].function([s[:, order] for s in student], teacher, order.argsort()[target])
    assert value.item() == approx(LOSSES["uskd"].function(student, teacher, target).item())


@pytest.mark.parametrize(
    ("names", "factor", "shift"),
    [
        ("kd dkd dist nkd rld wttm uskd cwd", 1, 5),
        ("standardize pkd", 7, 5),
        ("at nst sp kdsvd pkt", 7, 0),
        ("rkd", 7, 100),
    ],
)
def test_what_a_loss_does_not_see(names, factor, shift):
    for name in names.split():
        student, teacher, target = inputs(name)
        value = LOSSES[name].function(student, teacher, target).item()
        moved = LOSSES[name].function(
            [factor * s + shift for s in student], [factor * t - shift for t in teacher], target
        )
        assert moved.item() == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("name", ["rkd", "pkd"])
def test_neighbors_far_from_the_origin(name):
    """Differences keep their digits where |a|^2 + |b|^2 - 2ab, or a mean of squares less a squared mean, has none."""
    student, teacher, target = inputs(name, dtype=torch.float32)
    offset = 2.0**13  # a power of two above the data leaves 10 bits of each number
    far = [s + offset for s in student]
    value = LOSSES[name].function(far, teacher, target).item()
    assert value == pytest.approx(LOSSES[name].function([s - offset for s in far], teacher, target).item(), rel=1e-5)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("same", [2, 4])
def test_embeddings_at_the_same_place(squared, same):
    student, teacher = array(50, 4, 6), array(51, 4, 9)
    student[:same] = student[0].clone()
    value = d.rkd_loss(student.requires_grad_(), teacher, squared=squared)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all() and student.grad.abs().max() < 1e3


# ---- for any inputs


class Case(NamedTuple):
    """Tensors of any size and content, for every loss function.

    Attributes:
        samples: N.
        sizes: of the other axes in the order of their appearance, repeated.
        numbers: what the tensors hold, repeated.
        seed: of what else is drawn.
    """

    samples: int
    sizes: list[int]
    numbers: list[float]
    seed: int

    def build(self, name, agree=False):
        """Student, teacher and target in fp64. With `agree` the teacher is another student."""
        shapes = LOSSES[name].student, LOSSES[name].student if agree else LOSSES[name].teacher
        axes = dict(zip(dict.fromkeys("".join(chain(*shapes))), cycle(self.sizes), strict=False))
        # Fewer than two classes, and scores without a negative, are refused.
        axes = {axis: max(size, 2) if axis in "CK" else size for axis, size in axes.items()}
        numbers = cycle(self.numbers)

        def tensor(shape):
            size = [self.samples, *(axes[axis] for axis in shape)]
            return torch.tensor(list(islice(numbers, math.prod(size))), dtype=torch.float64).reshape(size)

        student, teacher = ([tensor(shape) for shape in part] for part in shapes)
        # bckd takes ignored and background rows as well.
        low, high = (-1, axes["C"] + 1) if name == "bckd" else (0, axes.get("C", 1))
        return student, teacher, torch.from_numpy(self.rng().integers(low, high, self.samples))

    def rng(self):
        return np.random.default_rng(self.seed)


def cases(numbers, step, samples=1):
    """With any of `numbers`, or many whole multiples of `step` up to 80."""
    seeds = st.integers(0, 2**32 - 1)
    many = seeds.map(lambda seed: (np.random.default_rng(seed).integers(-80, 81, 97) * step).tolist())
    numbers = st.lists(numbers, min_size=1, max_size=24) | many
    return st.builds(Case, st.integers(samples, 4), st.lists(st.integers(1, 4), min_size=1, max_size=6), numbers, seeds)


#: Of all formats, and with many ties.
ORDINARY = cases(st.integers(-80, 80).map(lambda number: number / 8), 0.125)
EXTREME = cases(st.sampled_from([1e4, -1e4, 0.0, 1.0, 1e-4]) | st.floats(-1e4, 1e4, width=16), 125.0, samples=0)


def approx(value):
    return pytest.approx(value, rel=1e-6, abs=1e-8)


@each()
@given(case=EXTREME, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_any_input_has_a_finite_loss_with_finite_gradients(name, case, dtype):
    """In the type of the input, and at least fp32; an empty batch has a loss of 0."""
    student, teacher, target = case.build(name)
    student, teacher = [s.to(dtype).requires_grad_() for s in student], [t.to(dtype) for t in teacher]
    value, grads = run(name, student, teacher, target)
    assert value.isfinite() and value.dtype == torch.promote_types(dtype, torch.float32)
    assert value.item() == 0 or case.samples
    for own, grad in zip(student, grads, strict=True):
        assert grad.shape == own.shape and grad.dtype == dtype and grad.isfinite().all()


@each()
@given(case=ORDINARY)
def test_the_order_of_the_samples_does_not_matter(name, case):
    student, teacher, target = case.build(name)
    order = case.rng().permutation(case.samples)
    value = LOSSES[name].function([s[order] for s in student], [t[order] for t in teacher], target[order])
    assert value.item() == approx(LOSSES[name].function(student, teacher, target).item())


@holding("a batch is the mean of its samples")
@given(case=ORDINARY)
def test_a_batch_is_the_mean_of_its_samples(name, case):
    student, teacher, target = case.build(name)
    single = [
        LOSSES[name].function([s[i] for s in student], [t[i] for t in teacher], target[i]).item()
        for i in torch.arange(case.samples)[:, None]
    ]
    assert LOSSES[name].function(student, teacher, target).item() == approx(sum(single) / case.samples)


@holding("the order of the classes does not matter", ON_LOGITS)
@given(case=ORDINARY)
def test_the_order_of_the_classes_does_not_matter(name, case):
    student, teacher, target = case.build(name)
    classes = student[0].shape[1]
    order = torch.from_numpy(case.rng().permutation(classes))
    # -1 and the number of classes are no classes.
    moved = torch.cat([order.argsort(), torch.tensor([classes, -1])])[target]
    value = LOSSES[name].function([s[:, order] for s in student], [t[:, order] for t in teacher], moved)
    assert value.item() == approx(LOSSES[name].function(student, teacher, target).item())


@holding("a number added to all logits of a sample does not matter", ON_LOGITS)
@given(case=ORDINARY)
def test_a_number_added_to_all_logits_of_a_sample_does_not_matter(name, case):
    student, teacher, target = case.build(name)
    rng = case.rng()
    moved = (
        [x + torch.from_numpy(rng.integers(-100_000, 100_000, (case.samples, 1))) for x in z]
        for z in (student, teacher)
    )
    assert LOSSES[name].function(*moved, target).item() == approx(
        LOSSES[name].function(student, teacher, target).item()
    )


@holding("no student has less than the teacher itself", WITH_TEACHER)
@given(case=ORDINARY)
def test_no_student_has_less_than_the_teacher_itself(name, case):
    student, teacher, target = case.build(name, agree=True)
    least, value = (LOSSES[name].function(s, teacher, target).item() for s in (teacher, student))
    assert least <= value + 1e-5 * max(abs(value), 1)
