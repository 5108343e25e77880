"""The pure functions of the optimizer switch, on bare torch objects: no Trainer in sight."""

import math

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import ReduceLROnPlateau as NamedReduceLROnPlateau
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import SGD, Adadelta, Adam, AdamW, Muon, RMSprop
from torch.optim import lr_scheduler as S
from torch.optim.swa_utils import SWALR

from lightning_tips.core import move_schedulers, note_full_rates, rebuild_optimizer, warm_up
from lightning_tips.core.optimizers import translate_weight_decay
from lightning_tips.optimizer import SwatsProjection, switch_optimizer
from lightning_tips.optimizer.swats import SettledTrigger


class OwnSGD(torch.optim.Optimizer):
    """Somebody's own optimizer, which passes its options on."""

    def __init__(self, params, lr=0.5, **options):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0} | options)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * (p.grad + group["weight_decay"] * p)


class OwnSGDSubclass(SGD):
    def __init__(self, params, **options):
        super().__init__(params, **options)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def groups(net: nn.Sequential, *options: dict) -> list[dict]:
    return [{"params": list(net[layer].parameters()), **o} for layer, o in zip((0, 2), options, strict=True)]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    inputs = torch.linspace(-1, 1, 24).view(8, 3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(net(inputs), inputs[:, :2]).backward()
        optimizer.step()


def sgd(params) -> SGD:
    return SGD(params, lr=0.1, momentum=0.9)


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


# ---- a new optimizer on old groups


@pytest.mark.parametrize(
    "factory",
    [sgd, Adam, RMSprop, Adadelta, timm.optim.Lion, timm.optim.AdamP, timm.optim.SGDP, OwnSGD, OwnSGDSubclass],
    ids=lambda factory: factory.__name__,
)
def test_any_optimizer_takes_over_and_trains(factory):
    net = network()
    old = AdamW(groups(net, {}, {"lr": 1e-4}), lr=1e-3)
    new = rebuild_optimizer(factory, old, lr=0.01)
    assert rates(new) == pytest.approx([0.01, 0.001])
    before = [p.clone() for p in net.parameters()]
    train(net, new)
    assert all(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_without_a_rate_the_factory_says_it():
    assert rates(rebuild_optimizer(sgd, Adam(network().parameters(), lr=1e-3))) == [0.1]


def test_groups_keep_their_parameters_and_order_frozen_ones_too():
    net = network()
    net[2].requires_grad_(False)
    old = Adam(groups(net, {}, {}))
    new = rebuild_optimizer(sgd, old)
    for old_group, new_group in zip(old.param_groups, new.param_groups, strict=True):
        assert [id(p) for p in old_group["params"]] == [id(p) for p in new_group["params"]]
    assert not net[2].weight.requires_grad


def test_ratios_between_groups_are_those_before_the_schedule():
    net = network()
    old = Adam(groups(net, {"lr": 1e-2}, {"lr": 1e-3}))
    scheduler = S.LambdaLR(old, [lambda step: 1.0, lambda step: 0.1**step])
    train(net, old)
    scheduler.step()
    assert rates(rebuild_optimizer(sgd, old, lr=1.0)) == pytest.approx([1.0, 0.1])


def test_options_that_differ_by_group_stay_and_others_are_the_new_ones():
    net = network()
    old = SGD(groups(net, {"nesterov": True, "momentum": 0.5}, {"momentum": 0.8}), lr=0.1)
    new = rebuild_optimizer(lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=False, maximize=True), old)
    assert [g["momentum"] for g in new.param_groups] == [0.5, 0.8]
    assert [g["nesterov"] for g in new.param_groups] == [True, False]
    assert [g["maximize"] for g in new.param_groups] == [True, True]
    agreeing = SGD(groups(net, {}, {}), lr=0.1, momentum=0.3)
    assert [g["momentum"] for g in rebuild_optimizer(sgd, agreeing).param_groups] == [0.9, 0.9]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda p: SGD(p, lr=-1.0), "refuses the parameters of Adam: Invalid learning rate"),
        (Muon, "some take matrices only"),
        (lambda p: SGD([q for g in p for q in g["params"]], lr=0.1), "must pass on the groups"),
        (lambda p: None, "made a NoneType"),
    ],
)
def test_a_factory_that_cannot_do_it_says_why(factory, message):
    with pytest.raises(MisconfigurationException, match=message):
        rebuild_optimizer(factory, Adam(groups(network(), {}, {})))


# ---- weight decay


def test_decay_from_adamw_to_sgd_shrinks_an_idle_weight_as_much_a_step():
    idle = nn.Parameter(torch.ones(1))
    old = AdamW([idle], lr=1e-3, weight_decay=0.1)
    new = rebuild_optimizer(sgd, old, lr=0.05)
    assert new.param_groups[0]["weight_decay"] == pytest.approx(1e-3 * 0.1 * (1 - 0.9) / 0.05)
    idle.grad = torch.zeros(1)
    for _ in range(200):  # momentum has come to its level
        new.step()
    before = idle.item()
    new.step()
    assert 1 - idle.item() / before == pytest.approx(1e-3 * 0.1, rel=1e-2)


def test_decay_there_and_back_is_the_same():
    net = network()
    first = AdamW(groups(net, {"weight_decay": 0.0}, {}), lr=1e-3, weight_decay=0.1)
    middle = rebuild_optimizer(sgd, first)
    last = rebuild_optimizer(lambda p: AdamW(p, lr=1e-3), middle)
    assert [g["weight_decay"] for g in last.param_groups] == pytest.approx([0.0, 0.1])


def test_l2_to_l2_keeps_the_coefficient():
    net = network()
    old = Adam(net.parameters(), weight_decay=0.02)
    assert translate_weight_decay(old, sgd(net.parameters())) == [0.02]


def test_decay_is_mapped_from_the_full_rate_of_a_one_cycle_schedule():
    net = network()
    old = AdamW(net.parameters(), weight_decay=0.1)
    S.OneCycleLR(old, max_lr=0.01, total_steps=10)  # stands at 0.01 / 25 now
    assert translate_weight_decay(old, SGD(net.parameters(), lr=0.1)) == pytest.approx([0.01])


@pytest.mark.parametrize(
    ("policy", "factory", "expected"),
    [
        ("map", lambda p: SGD(p, lr=0.1, weight_decay=5e-4), [0.0, 5e-4]),  # asked for
        ("keep", sgd, [0.0, 0.1]),
        ("optimizer", sgd, [0.0, 0.0]),
        ("optimizer", lambda p: AdamW(p, lr=0.1), [0.0, 0.01]),
        ("map", lambda p: OwnSGDSubclass(p, lr=1e-3), [0.0, 0.1]),  # its default is found behind **options
    ],
)
def test_choice_of_weight_decay(policy, factory, expected):
    old = AdamW(groups(network(), {"weight_decay": 0.0}, {}), lr=1e-3, weight_decay=0.1)
    new = rebuild_optimizer(factory, old, weight_decay=policy)
    assert [g["weight_decay"] for g in new.param_groups] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (lambda p: AdamW(p, lr=1e-3, weight_decay=0.01), sgd, "0.01 decoupled -> 1e-05 L2"),
        (Adam, lambda p: AdamW(p, lr=1e-3), "0 L2 -> 0 decoupled"),  # AdamW's own 0.01 is put aside
        (lambda p: timm.optim.AdamP(p, lr=1e-3, weight_decay=0.01), SGD, "0.01 decoupled -> 0.01 L2"),
        (Adam, sgd, None),
    ],
)
def test_details_state_the_weight_decay(old, new, words):
    assert switch_optimizer(old(network().parameters()), new).details.get("weight_decay") == words


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


# ---- the SWATS projection


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
