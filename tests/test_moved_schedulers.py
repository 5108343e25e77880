"""Schedulers on a new optimizer, and its warm-up."""

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau as NamedReduceLROnPlateau
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import SGD, Adam
from torch.optim import lr_scheduler as S
from torch.optim.swa_utils import SWALR

from lightning_tips.core import move_schedulers, note_full_rates, rebuild_optimizer, warm_up
from lightning_tips.optimizer import switch_optimizer

from operated import groups, network, rates, sgd, train

# ---- schedulers


FOLLOWING = {
    "StepLR": lambda o: S.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 6, 8], gamma=0.3),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 12, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 4, T_mult=2, eta_min=1e-4),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda step: 0.8),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "LinearLR": lambda o: S.LinearLR(o, 0.1, total_iters=8),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 12, power=2),
    "SequentialLR": lambda o: S.SequentialLR(
        o, [S.LinearLR(o, 0.1, total_iters=7), S.CosineAnnealingLR(o, 6, eta_min=1e-4)], [7]
    ),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.LinearLR(o, 0.1, total_iters=7), S.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("at", [0, 1, 5, 7])
@pytest.mark.parametrize("name", FOLLOWING)
def test_a_schedule_goes_on_in_its_shape(name, at):
    """Steps both optimizers side by side: the new rate is always the old one, 50 times larger, in each group."""
    net, twin = network(), network()
    old = Adam(groups(net, {"lr": 1e-2}, {"lr": 1e-3}))
    config = LRSchedulerConfig(FOLLOWING[name](old))
    for _ in range(at):
        train(net, old)
        config.scheduler.step()
    kept = config.scheduler.state_dict()
    new = rebuild_optimizer(sgd, old, lr=0.5)
    moved, dropped = move_schedulers([config], old, new)
    assert dropped == []
    assert config.scheduler.state_dict() == kept, "the old scheduler was changed"
    for _ in range(12 - at):
        assert rates(new) == pytest.approx([50 * rate for rate in rates(old)], rel=1e-6, abs=1e-12)
        train(twin, old)
        train(net, new)
        config.scheduler.step()
        moved[0].scheduler.step()
    assert moved[0].scheduler.get_last_lr() == rates(new)


def references(scheduler: object, optimizer: torch.optim.Optimizer) -> list[str]:
    inner = [r for s in getattr(scheduler, "_schedulers", []) for r in references(s, optimizer)]
    return [name for name, value in vars(scheduler).items() if value is optimizer] + inner


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_moved_schedule_does_not_know_the_old_optimizer(name):
    old = Adam(network().parameters())
    scheduler = FOLLOWING[name](old)
    scheduler.also_kept_here = old
    new = rebuild_optimizer(sgd, old)
    moved, _ = move_schedulers([LRSchedulerConfig(scheduler)], old, new)
    assert references(moved[0].scheduler, old) == []
    assert {"optimizer", "also_kept_here"} <= set(references(moved[0].scheduler, new))
    assert "optimizer" in references(scheduler, old)


@pytest.mark.parametrize("kind", [S.ReduceLROnPlateau, NamedReduceLROnPlateau])
def test_reduce_on_plateau_begins_anew_with_its_bounds_scaled(kind):
    net = network()
    old = Adam(net.parameters(), lr=1e-2)
    arguments = {"monitor": "train_loss"} if kind is NamedReduceLROnPlateau else {}
    scheduler = kind(old, patience=0, factor=0.1, min_lr=1e-3, **arguments)
    config = LRSchedulerConfig(scheduler, reduce_on_plateau=True, monitor="train_loss", frequency=2)
    note_full_rates([config])
    for _ in range(3):
        scheduler.step(1.0)
    assert rates(old) == [1e-3]
    new = rebuild_optimizer(sgd, old, lr=0.5)
    (moved,), _ = move_schedulers([config], old, new)
    assert (moved.monitor, moved.frequency, moved.reduce_on_plateau) == ("train_loss", 2, True)
    assert rates(new) == [0.5]
    moved.scheduler.step(1.0)
    assert rates(new) == [0.5]
    moved.scheduler.step(1.0)
    assert rates(new) == pytest.approx([0.05])
    moved.scheduler.step(1.0)
    assert rates(new) == pytest.approx([0.05])  # a tenth of its first rate, as before
    assert rates(old) == [1e-3]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: S.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: S.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
        lambda o: SWALR(o, 0.01),
        lambda o: S.SequentialLR(o, [S.LinearLR(o), S.CyclicLR(o, 0.01, 0.1, cycle_momentum=False)], [2]),
    ],
    ids=["OneCycleLR", "CyclicLR", "SWALR", "SequentialLR with CyclicLR"],
)
def test_bound_schedulers_are_dropped_and_named(make):
    old = Adam(network().parameters())
    scheduler = make(old)
    switch = switch_optimizer(old, sgd, schedulers=[LRSchedulerConfig(scheduler)])
    assert (switch.schedulers, switch.dropped) == ([], [type(scheduler).__name__])
    assert switch.details["schedulers"] == f"{type(scheduler).__name__} dropped"
    assert rates(switch.optimizer) == [0.1]


def test_schedulers_of_another_optimizer_are_left_alone():
    one, other = Adam(network().parameters()), Adam(network().parameters())
    config = LRSchedulerConfig(S.StepLR(other, 1))
    assert move_schedulers([config], one, sgd(network().parameters())) == ([], [])
    assert config.scheduler.optimizer is other


def test_a_rate_found_after_the_schedule_was_made_is_its_start():
    net = network()
    old = Adam(net.parameters(), lr=1e-3)
    config = LRSchedulerConfig(S.StepLR(old, 1, gamma=0.5))
    old.param_groups[0]["lr"] = 0.02  # as Lightning's LearningRateFinder does
    note_full_rates([config])
    train(net, old)
    config.scheduler.step()
    assert rates(old) == [0.01]
    assert switch_optimizer(old, sgd, schedulers=[config]).details["lr"] == pytest.approx(0.05)


def test_details_hold_the_rate_of_the_first_step():
    old = Adam(network().parameters(), lr=1e-3)
    config = LRSchedulerConfig(S.LinearLR(old, 0.25, total_iters=4))
    going_on = switch_optimizer(old, sgd, lr=0.4, schedulers=[config])
    assert (going_on.details["lr"], going_on.full_rate, going_on.share) == pytest.approx((0.1, 0.4, 0.25))
    assert going_on.details["from_lr"] == pytest.approx(2.5e-4)
    replaced = switch_optimizer(old, sgd, schedulers=[config], new_scheduler=lambda o: S.LinearLR(o, 0.25))
    assert (replaced.details["lr"], replaced.share) == (0.1, 1.0)
    assert replaced.details["schedulers"] == "new LinearLR"


# ---- warm-up


def test_warm_up_rises_linearly_and_puts_the_rate_back():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = SGD([weight], lr=0.3)
    walked: list[float] = []
    warm_up(optimizer, 4, lambda: len(walked))
    for _ in range(6):
        before = weight.item()
        weight.grad = torch.ones(1)
        optimizer.step()
        walked.append(before - weight.item())
        assert rates(optimizer) == [0.3]
    assert walked == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.3, 0.3])
