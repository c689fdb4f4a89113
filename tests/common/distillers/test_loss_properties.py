"""What holds for every loss function: one table of them, each property once.

A new loss function is one row of `LOSSES`. What its values are is in test_loss_examples.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from d2distill.common import distillers as d
from tests.goldens.fill import array


class Loss(NamedTuple):
    #: Of lists of tensors, which are the student's (they learn) and the teacher's (they do not), and of the target.
    function: Callable[[list[Tensor], list[Tensor], Tensor], Tensor]
    #: Shapes of one sample's tensors.
    student: list[tuple[int, ...]]
    teacher: list[tuple[int, ...]]


def ofd(student, teacher, target):
    return d.ofd_loss(student, teacher, [s.new_full((s.shape[1],), -0.25) for s in student])


def vid(student, teacher, target):
    return d.vid_loss(*student, *teacher, student[0].new_full((3,), 5.0))


def standardize(student, teacher, target):
    z = d.standardize_logits(*student)
    return (z * torch.arange(z.shape[1])).sum()


LOGITS, EMBEDDINGS = ([(10,)], [(10,)]), ([(6,)], [(9,)])
EQUAL = ([(3, 4, 4), (5, 2, 3)],) * 2
# The teacher's maps: more channels and a smaller one; fewer channels and a larger one.
MAPS = [(3, 4, 4), (5, 2, 3)], [(4, 2, 4), (2, 4, 5)]
LOSSES = {
    "kd": Loss(lambda s, t, y: d.kd_loss(*s, *t, 4.0), *LOGITS),
    "dkd": Loss(lambda s, t, y: d.dkd_loss(*s, *t, y, 1.0, 8.0, 4.0), *LOGITS),
    "dist": Loss(lambda s, t, y: d.dist_loss(*s, *t, 1.5, 0.5), *LOGITS),
    "nkd": Loss(lambda s, t, y: d.nkd_loss(*s, *t, y, 3.5, 3.0), *LOGITS),
    "rld": Loss(lambda s, t, y: d.rld_loss(*s, *t, y, 1.5, 8.0, 2.0, 4.0), *LOGITS),
    "wttm": Loss(lambda s, t, y: d.wttm_loss(*s, *t, 0.1), *LOGITS),
    "bckd": Loss(lambda s, t, y: d.bckd_loss(*s, *t, y), *LOGITS),
    "uskd": Loss(lambda s, t, y: d.uskd_loss(*s, y, 1.0, 0.1, 0.005), [(10,), (10,)], []),
    "standardize": Loss(standardize, [(10,)], []),
    "crd": Loss(lambda s, t, y: d.crd_loss(*s, 40), [(8,)], []),
    "at": Loss(lambda s, t, y: d.at_loss(s, t), *MAPS),
    "nst": Loss(lambda s, t, y: d.nst_loss(s, t), *MAPS),
    "sp": Loss(lambda s, t, y: d.sp_loss(s, t), *MAPS),
    "kdsvd": Loss(lambda s, t, y: d.kdsvd_loss(s, t), *MAPS),
    "hcl": Loss(lambda s, t, y: d.hcl_loss(s, t), *EQUAL),
    "ofd": Loss(ofd, *EQUAL),
    "pkd": Loss(lambda s, t, y: d.pkd_loss(s, t), *EQUAL),
    "cwd": Loss(lambda s, t, y: d.cwd_loss(s, t), *EQUAL),
    "mgd": Loss(lambda s, t, y: d.mgd_loss(s, t), *EQUAL),
    "fitnet": Loss(lambda s, t, y: d.fitnet_loss(*s, *t), [(3, 4, 4)], [(3, 4, 4)]),
    "simkd": Loss(lambda s, t, y: d.simkd_loss(*s, *t), [(3, 4, 4)], [(3, 8, 8)]),
    "vid": Loss(vid, [(3, 4, 4)], [(3, 4, 4)]),
    "pkt": Loss(lambda s, t, y: d.pkt_loss(*s, *t), *EMBEDDINGS),
    "rkd": Loss(lambda s, t, y: d.rkd_loss(*s, *t), *EMBEDDINGS),
}
WITH_TEACHER = [name for name, loss in LOSSES.items() if loss.teacher]
#: These are not means over samples: relations between samples, or statistics of the batch.
OVER_THE_BATCH = ["sp", "pkt", "rkd", "dist", "uskd", "pkd", "standardize"]
SQUARES = ["hcl", "ofd", "mgd", "fitnet", "simkd", "vid"]
FORMATS = [torch.float32, torch.bfloat16, torch.float16]


def each(names=LOSSES):
    return pytest.mark.parametrize("name", list(names))


def tensors(seed, shapes, n=4, scale=1.0, dtype=torch.float64):
    return [array(seed + i, n, *shape, scale=scale).to(dtype) for i, shape in enumerate(shapes)]


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
    if LOSSES[name].student[0] == (10,):  # logits: all of them huge; a single sample with two classes
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
def test_an_empty_batch_is_zero_with_a_graph(name):
    student, teacher, target = inputs(name, n=0)
    value, grads = run(name, student, teacher, target)
    assert value.item() == 0 and [grad.shape for grad in grads] == [s.shape for s in student]


@each()
def test_no_shape_depends_on_the_data(name):
    """Nor does any branch: boolean masks, `item()` and `if tensor:` wait for the device on CUDA. Fake tensors have no
    data, and raise."""
    with FakeTensorMode() as mode:
        student, teacher, target = inputs(name)
        student, teacher = ([mode.from_tensor(x.detach()) for x in part] for part in (student, teacher))
        value, grads = run(name, [s.requires_grad_() for s in student], teacher, mode.from_tensor(target))
        assert isinstance(value, FakeTensor) and all(isinstance(grad, FakeTensor) for grad in grads)


@each()
def test_order_of_the_samples_does_not_matter(name):
    student, teacher, target = inputs(name)
    order, function = [2, 0, 3, 1], LOSSES[name].function
    value = function(student, teacher, target).item()
    shuffled = [s[order] for s in student]
    assert function(shuffled, [t[order] for t in teacher], target[order]).item() == pytest.approx(value, rel=1e-9)
    if teacher:  # but it matters who is compared with whom
        assert function(shuffled, teacher, target).item() != pytest.approx(value, rel=1e-5)


@each(["kd", "dkd", "dist", "nkd", "rld", "wttm", "bckd", "uskd"])
def test_order_of_the_classes_does_not_matter(name):
    student, teacher, target = inputs(name)
    order = torch.tensor([4, 9, 2, 7, 1, 0, 3, 8, 6, 5])
    permuted = LOSSES[name].function(
        [s[:, order] for s in student], [t[:, order] for t in teacher], order.argsort()[target]
    )
    assert permuted.item() == pytest.approx(LOSSES[name].function(student, teacher, target).item(), rel=1e-9)


@each(sorted({*LOSSES} - {*OVER_THE_BATCH}))
def test_a_batch_is_the_mean_of_its_samples(name):
    student, teacher, target = inputs(name)
    function = LOSSES[name].function
    single = [
        function(*([x[i : i + 1] for x in part] for part in (student, teacher)), target[i : i + 1]) for i in range(4)
    ]
    assert function(student, teacher, target).item() == pytest.approx(sum(s.item() for s in single) / 4, rel=1e-9)


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
