"""What `OptimizerSwitchCallback` switches to: any optimizer, its rate, its schedule, its groups."""

import csv
import gc
import weakref

import pytest
import timm.optim
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import ReduceLROnPlateau as NamedReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD, Adadelta, Adam, AdamW, RMSprop
from torch.optim import lr_scheduler as S

from lightning_tips import OptimizerSwitchCallback as Switch

from harness import fit
from switching import Scripted, Trace, kinds, long_epochs, sgd, watched_sgd


class OwnSGD(SGD):
    pass


@pytest.mark.parametrize(
    ("factory", "lr"),
    [(f, lr) for f in (sgd, Adam, RMSprop, Adadelta, timm.optim.Lion, timm.optim.AdamP, OwnSGD) for lr in (None, 0.002)]
    + [(timm.optim.SGDP, 0.002)],  # has no rate of its own
)
def test_any_optimizer_can_be_the_target(factory, lr, tmp_path):
    tip = Switch(factory, lr=lr, trigger="epoch", at=1)
    trainer = fit(tip, folder=tmp_path, module=Scripted(), max_epochs=2)
    own = factory([{"params": [nn.Parameter(torch.zeros(1, 1))], **({"lr": lr} if lr else {})}])
    assert type(trainer.optimizers[0]) is type(own)
    assert trainer.optimizers[0].param_groups[0]["lr"] == own.param_groups[0]["lr"]


def test_the_old_optimizer_is_freed(tmp_path):
    found = []
    spy = type("Spy", (Callback,), {"on_train_start": lambda _, t, m: found.append(weakref.ref(t.optimizers[0]))})()
    trainer = fit(Switch(sgd, lr="auto", trigger="epoch", at=3), spy, folder=tmp_path, max_epochs=4)
    gc.collect()
    assert found[0]() is None
    assert kinds(trainer) == ["SGD"]


def test_auto_rate_under_a_schedule_is_the_rate_of_now(tmp_path):
    def halved_each_epoch(module):
        optimizer = SGD(module.parameters(), lr=0.08)
        return [optimizer], [S.StepLR(optimizer, 1, gamma=0.5)]

    tip, trace = Switch(lambda p: SGD(p, lr=1.0), lr="auto", trigger="step", at=47), Trace()
    one_look_in_each_epoch = {"limit_train_batches": 4, "max_epochs": 14}
    module = Scripted(configure=halved_each_epoch)
    fit(tip, trace, folder=tmp_path, module=module, **one_look_in_each_epoch)
    details = tip.events[0].details
    assert details["lr"] == pytest.approx(details["swats_lr"])
    assert trace.rates()[47] == pytest.approx(details["swats_lr"])
    assert trace.rates()[48] == pytest.approx(details["swats_lr"] / 2), "the schedule goes on"


def test_warns_when_given_and_projected_rate_are_far_apart(tmp_path):
    tip = Switch(lambda p: SGD(p, lr=0.07), trigger="swats")
    with pytest.warns(UserWarning, match=r"SGD starts with lr=0.07, 3.5 times what the SWATS projection gives \(0.02"):
        fit(tip, folder=tmp_path, module=Scripted(configure=watched_sgd(0.02)), **long_epochs())


def test_warns_when_there_is_no_projection_and_takes_the_own_rate(tmp_path):
    tip = Switch(sgd, lr="auto", trigger="step", at=5)  # before the first look
    with pytest.warns(UserWarning, match=r"project on no positive learning rate; SGD starts with its own, 0\.05"):
        fit(tip, folder=tmp_path, module=Scripted())
    assert tip.events[0].details["lr"] == 0.05


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_new_scheduler_replaces_the_old_one(interval, tmp_path):
    trace = Trace()
    tip = Switch(sgd, 0.1, lambda o: S.ExponentialLR(o, 0.5), "epoch", 1, lr_scheduler_interval=interval)
    trainer = fit(tip, trace, folder=tmp_path, max_epochs=3)
    assert [type(c.scheduler).__name__ for c in trainer.lr_scheduler_configs] == ["ExponentialLR"]
    expected = [0.1] * 4 + [0.05] * 4 if interval == "epoch" else [0.1 * 0.5**k for k in range(8)]
    assert trace.rates() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "key", "monitor"),
    [
        (lambda o: S.ReduceLROnPlateau(o, patience=0), "val_loss", "val_loss"),
        (lambda o: S.ReduceLROnPlateau(o, patience=0), "val_acc", "val_acc"),
        (lambda o: NamedReduceLROnPlateau(o, monitor="val_other", patience=0), "val_loss", "val_loss"),
    ],
)
def test_a_new_reduce_on_plateau_gets_its_metric(make, key, monitor, tmp_path):
    tip, trace = Switch(sgd, 0.1, make, "epoch", 1, monitor), Trace()
    fit(tip, trace, folder=tmp_path, max_epochs=4, module=Scripted(lambda step: 0.0, key=key))
    assert trace.rates() == pytest.approx([0.1] * 8 + [0.01] * 4)


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("trigger", [("epoch", 2), ("step", 6)])
def test_the_modules_schedule_goes_on(interval, trigger, tmp_path):
    def configure(module):
        optimizer = Adam(module.parameters(), lr=1e-3)
        scheduler = S.CosineAnnealingLR(optimizer, 6 if interval == "epoch" else 24, eta_min=1e-5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    plain, switched = Trace(), Trace()
    fit(plain, folder=tmp_path, module=Scripted(configure=configure))
    tip = Switch(sgd, 0.1, trigger=trigger[0], at=trigger[1])
    fit(tip, switched, folder=tmp_path, module=Scripted(configure=configure))
    assert tip.events[0].details["schedulers"] == "CosineAnnealingLR goes on"
    assert switched.rates() == pytest.approx([100 * rate for rate in plain.rates("Adam")[-len(switched.rates()) :]])


def test_one_cycle_is_dropped_and_the_event_says_so(tmp_path):
    def configure(module):
        optimizer = Adam(module.parameters())
        return [optimizer], [{"scheduler": S.OneCycleLR(optimizer, 0.01, total_steps=24), "interval": "step"}]

    tip, trace = Switch(sgd, trigger="epoch", at=2), Trace()
    trainer = fit(tip, trace, folder=tmp_path, module=Scripted(configure=configure))
    assert tip.events[0].details["schedulers"] == "OneCycleLR dropped"
    assert trainer.lr_scheduler_configs == []
    assert trace.rates() == [0.05] * 16


def test_warm_up_composes_with_a_schedule_and_the_rate_monitor(tmp_path):
    tip, trace = Switch(sgd, 0.4, trigger="epoch", at=1, warmup_steps=5), Trace()
    logger = CSVLogger(tmp_path)
    monitor = LearningRateMonitor("step")
    fit(tip, monitor, trace, folder=tmp_path, max_epochs=4, logger=logger, log_every_n_steps=1)
    # PlainModule halves the rate after three epochs
    assert trace.rates() == pytest.approx([0.08, 0.16, 0.24, 0.32, *[0.4] * 4, *[0.2] * 4])
    with open(logger.experiment.metrics_file_path) as file:
        shown = [float(row["lr-SGD"]) for row in csv.DictReader(file) if row["lr-SGD"]]
    assert shown == pytest.approx([0.4] * 8 + [0.2] * 4)


def test_groups_frozen_parameters_and_decay_survive(tmp_path):
    def configure(module):
        module.features[0].requires_grad_(False)
        return AdamW(
            [
                {"params": list(module.features.parameters()), "lr": 1e-4, "weight_decay": 0.0},
                {"params": list(module.head.parameters())},
            ],
            lr=1e-3,
            weight_decay=0.1,
        )

    tip = Switch(sgd, trigger="epoch", at=1)
    module = Scripted(configure=configure)
    frozen = module.features[0].weight.clone()
    trainer = fit(tip, folder=tmp_path, module=module, max_epochs=2)
    groups = trainer.optimizers[0].param_groups
    assert [g["lr"] for g in groups] == pytest.approx([0.005, 0.05])
    assert [g["weight_decay"] for g in groups] == pytest.approx([0.0, 1e-3 * 0.1 * 0.1 / 0.05])
    assert tip.events[0].details["weight_decay"] == "0.1 decoupled -> 0.0002 L2"
    assert torch.equal(module.features[0].weight, frozen)
