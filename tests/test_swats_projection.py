"""The SWATS projection: the rate of SGD that matches the steps of another optimizer."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from lightning_tips.optimizer import SwatsProjection
from lightning_tips.optimizer.swats import SettledTrigger

from operated import groups, network, sgd, train


def watch(optimizer, every: int = 1) -> SwatsProjection:
    projection = SwatsProjection(every)
    projection.watch(optimizer)
    return projection


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_projection_of_sgd_is_its_own_rate(decay):
    net = network()
    optimizer = SGD(groups(net, {}, {}), lr=0.03, weight_decay=decay)
    projection = watch(optimizer)
    train(net, optimizer, 20)
    assert projection.scale() == pytest.approx(0.03, rel=1e-4)
    assert projection.rate_for(SGD(net.parameters(), lr=1.0)) == pytest.approx(0.03, rel=1e-4)
    assert projection.rate_for(SGD(net.parameters(), lr=1.0, momentum=0.9)) == pytest.approx(0.003, rel=1e-4)
    damped = SGD(net.parameters(), lr=1.0, momentum=0.9, dampening=0.5)
    assert projection.rate_for(damped) == pytest.approx(0.006, rel=1e-4)


def test_projection_is_the_ratio_of_averages_reckoned_by_hand():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Adam([weight], lr=0.1)
    projection = watch(optimizer)
    lengths, descents, average = [], [], lambda values: sum(0.99**k * v for k, v in enumerate(reversed(values)))
    for k in range(6):
        weight.grad = torch.tensor([1.0 + k, 0.5 * (-1) ** k])
        before = weight.detach().clone()
        optimizer.step()
        p = weight.detach() - before
        lengths.append(float(p @ p))
        descents.append(-float(p @ weight.grad))
    assert projection.scale() == pytest.approx(average(lengths) / average(descents), rel=1e-5)
    singles = [a / b for a, b in zip(lengths, descents, strict=True)]
    assert projection.scale() != pytest.approx(sum(singles) / 6, rel=1e-2)  # not the average of ratios


def test_projection_takes_decoupled_decay_out():
    plain, decayed = network(), network()
    first, second = Adam(plain.parameters(), lr=1e-3), AdamW(decayed.parameters(), lr=1e-3, weight_decay=10.0)
    projections = watch(first), watch(second)
    train(plain, first)
    train(decayed, second)
    assert projections[0].scale() == pytest.approx(projections[1].scale(), rel=1e-4)


def test_projection_looks_at_every_tenth_step():
    net = network()
    optimizer = Adam(net.parameters())
    projection = watch(optimizer, every=10)
    train(net, optimizer, 9)
    assert (projection.looks, projection.scale()) == (0, None)
    train(net, optimizer, 11)
    assert projection.looks == 2
    projection.unwatch()
    train(net, optimizer, 20)
    assert projection.looks == 2


def test_projection_of_a_walk_uphill_is_unusable():
    net = network()
    optimizer = SGD(net.parameters(), lr=0.01, maximize=True)
    projection = watch(optimizer)
    train(net, optimizer, 5)
    assert projection.scale() is None
    assert projection.rate_for(sgd(net.parameters())) is None


def test_projection_survives_an_overflow():
    net = network()
    optimizer = SGD(net.parameters(), lr=0.03)
    projection = watch(optimizer)
    train(net, optimizer, 5)
    with torch.no_grad():
        kept = [p.clone() for p in net.parameters()]
        for p in net.parameters():
            p.grad.fill_(math.inf)
        optimizer.step()
        for p, k in zip(net.parameters(), kept, strict=True):
            p.copy_(k)
    train(net, optimizer, 5)
    assert projection.scale() == pytest.approx(0.03, rel=1e-4)


def test_projection_resumes_to_the_bit():
    net = network()
    optimizer = Adam(net.parameters())
    whole, first = SwatsProjection(every=3), SwatsProjection(every=3)
    whole.watch(optimizer)
    first.watch(optimizer)
    train(net, optimizer, 8)
    second = SwatsProjection(every=3)
    second.load_state_dict(first.state_dict())
    first.unwatch()
    second.watch(optimizer)
    train(net, optimizer, 8)
    assert second.state_dict() == whole.state_dict()
    assert first.state_dict() != whole.state_dict()


def test_settled_when_the_averages_agree_for_long_enough():
    net = network()
    optimizer = SGD(net.parameters(), lr=0.03)
    projection, settled = watch(optimizer), SettledTrigger(tolerance=0.1, hold=10)
    fired = []
    for _ in range(45):
        train(net, optimizer)
        fired.append(settled.update(projection))
    assert fired.index(True) == SwatsProjection.MIN_LOOKS + 10 - 2  # the tenth agreement, counted from the 30th look
    assert settled.update(projection), "asking again counts no look twice"
    optimizer.param_groups[0]["lr"] = 0.3  # the fast average runs away
    train(net, optimizer)
    assert not settled.update(projection)


@pytest.mark.parametrize("arguments", [{"tolerance": 0.0}, {"hold": 0}])
def test_settled_refuses_nonsense(arguments):
    with pytest.raises(ValueError, match="must be above 0"):
        SettledTrigger(**arguments)
