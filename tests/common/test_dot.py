"""DOT: two gradients with a momentum each, against its formula written out, and against SGD."""

import copy

import pytest
import torch
from torch import nn

from d2distill.common.engine.dot import DOT

STEPS = 5


class Net(nn.Module):
    """`shared` is reached by both losses, `head` by the task's alone, `connector` by the distillation's alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.head, self.connector = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 5)
        self.double()

    def losses(self, step):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        hidden = self.shared(x).tanh()
        return self.head(hidden).square().mean(), (self.connector(hidden) - 1).square().mean()


def train(net, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        task, distill = net.losses(step)
        optimizer.backward({"loss_ce": task}, {"loss_kd": distill})
        optimizer.step()


def assert_close(one, two):
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_delta_it_is_sgd_on_the_sum(decay):
    one, two = Net(), Net()
    train(one, DOT(one.parameters(), 0.1, 0.9, delta=0.0, weight_decay=decay), range(STEPS))
    sgd = torch.optim.SGD(two.parameters(), 0.1, 0.9, weight_decay=decay)
    for step in range(STEPS):
        sgd.zero_grad()
        sum(two.losses(step)).backward()
        sgd.step()
    assert_close(one, two)
    assert not torch.equal(one.shared.weight, Net().shared.weight)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_against_its_formula(decay, lr=0.1, momentum=0.9, delta=0.05):
    one, two = Net(), Net()
    train(one, DOT(one.parameters(), lr, momentum, delta, decay), range(STEPS))
    task, distill = ({n: 0.0 for n, _ in two.named_parameters()} for _ in range(2))
    for step in range(STEPS):
        gradients = []
        for i in range(2):
            two.zero_grad()
            two.losses(step)[i].backward()
            gradients.append({n: p.grad for n, p in two.named_parameters() if p.grad is not None})
        with torch.no_grad():
            for n, p in two.named_parameters():
                old = p.clone()
                if n.startswith("shared"):
                    task[n] = (momentum - delta) * task[n] + gradients[0][n] + decay * old
                    distill[n] = (momentum + delta) * distill[n] + gradients[1][n]
                    p -= lr * (task[n] + distill[n])
                elif n.startswith("head"):
                    assert n not in gradients[1]
                    task[n] = momentum * task[n] + gradients[0][n] + decay * old
                    p -= lr * task[n]
                else:
                    assert n not in gradients[0]
                    distill[n] = momentum * distill[n] + gradients[1][n] + decay * old
                    p -= lr * distill[n]
    assert_close(one, two)


def test_groups_have_settings_of_their_own():
    one, two = Net(), Net()
    slow = DOT([{"params": one.shared.parameters(), "lr": 0.0}, {"params": one.head.parameters()}], 0.1)
    train(one, slow, range(STEPS))
    assert torch.equal(one.shared.weight, two.shared.weight) and not torch.equal(one.head.weight, two.head.weight)
    assert torch.equal(one.connector.weight, two.connector.weight)


def test_state_dict_round_trip():
    one = Net()
    optimizer = DOT(one.parameters(), 0.1, 0.9, 0.05, 0.1)
    train(one, optimizer, range(2))
    two = Net()
    other = DOT(two.parameters(), 0.3)
    two.load_state_dict(one.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(one, optimizer, range(2, STEPS))
    train(two, other, range(2, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    # Without the buffers it would go another way.
    three = Net()
    train(three, DOT(three.parameters(), 0.1, 0.9, 0.05, 0.1), range(2))
    train(three, DOT(three.parameters(), 0.1, 0.9, 0.05, 0.1), range(2, STEPS))
    assert not torch.allclose(one.shared.weight, three.shared.weight)


def test_frozen_and_unreached_parameters_stay():
    net = Net()
    net.head.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3))
    before = copy.deepcopy(net.head.state_dict())
    optimizer = DOT([*net.parameters(), unused], 0.1, weight_decay=0.1)
    train(net, optimizer, range(2))
    assert all(torch.equal(before[n], v) for n, v in net.head.state_dict().items())
    assert torch.equal(unused, torch.ones(3)) and unused not in optimizer.state


def test_a_gradient_is_applied_once():
    net = Net()
    optimizer = DOT(net.connector.parameters(), 0.1, 0.5, 0.1)
    task, distill = net.losses(0)
    optimizer.backward({"loss_ce": task + 0 * net.connector.weight.sum()}, {"loss_kd": distill})
    optimizer.step()
    optimizer.zero_grad()
    before = net.connector.weight.clone()
    optimizer.step()
    assert torch.equal(before, net.connector.weight)


@pytest.mark.parametrize(("momentum", "delta"), [(0.9, 0.1), (0.9, -0.01), (0.1, 0.1), (0.5, 0.5)])
def test_settings_that_do_not_converge(momentum, delta):
    with pytest.raises(ValueError, match="delta"):
        DOT(Net().parameters(), 0.1, momentum, delta)


def test_gradients_that_are_expanded_views():
    """The gradient of a sum is one number, expanded: no memory of its own."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = DOT([weight], lr=1.0, momentum=0.5, delta=0.25)
    for step in range(2):
        optimizer.backward({"loss_ce": weight.sum()}, {"loss_kd": 2 * weight.sum()})
        optimizer.step()
        # v_task 1, then 1.25; v_distill 2, then 3.5.
        assert weight.tolist() == [[-2.0, -6.75][step]] * 3
