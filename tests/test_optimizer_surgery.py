"""A new optimizer on old parameter groups, and what becomes of weight decay."""

import pytest
import timm.optim
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD, Adadelta, Adam, AdamW, Muon, RMSprop
from torch.optim import lr_scheduler as S

from lightning_tips.core import rebuild_optimizer
from lightning_tips.core.optimizers import translate_weight_decay
from lightning_tips.optimizer import switch_optimizer

from operated import OwnSGD, OwnSGDSubclass, groups, network, rates, sgd, train

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
