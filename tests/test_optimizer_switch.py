"""`OptimizerSwitchCallback` in real runs: when it switches, to what, beside what. See also `test_switch_resume.py`."""

import csv
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import ReduceLROnPlateau as NamedReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD, Adadelta, Adam, AdamW, RMSprop
from torch.optim import lr_scheduler as S

from lightning_tips import OptimizerSwitchCallback as Switch
from lightning_tips.optimizer import FluctuationTrigger, PlateauTrigger

from harness import STEPS_A_EPOCH, PlainData, PlainModule, build, fit


class Scripted(PlainModule):
    """Logs what the test says, by the number of steps done, and has the optimizers that the test says."""

    def __init__(self, script: Callable[[int], float] = lambda step: 1.0, configure: Any = None, key: str = "val_loss"):
        super().__init__(scheduler=False)
        self.script, self.configure, self.key = script, configure, key

    def training_step(self, batch, batch_idx):
        if self.key == "train_metric":
            self.log("train_metric", self.script(self.global_step), on_step=False, on_epoch=True)
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_other", 0.0)
        if self.key != "train_metric":
            self.log(self.key, self.script(self.global_step))

    def configure_optimizers(self):
        return self.configure(self) if self.configure else super().configure_optimizers()


class Gan(PlainModule):
    """Manual optimization of two optimizers in turn; steps its own schedulers."""

    def __init__(self, scheduler: Any = lambda o: S.StepLR(o, 1, gamma=0.5), keeps: str = "") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.make_scheduler, self.keeps, self.kept = scheduler, keeps, None

    def configure_optimizers(self):
        optimizers = [Adam(self.features.parameters(), lr=1e-3), Adam(self.head.parameters(), lr=2e-3)]
        if self.keeps == "torch optimizer":
            self.kept = optimizers[0]
        return optimizers, [self.make_scheduler(o) for o in optimizers]

    def training_step(self, batch, batch_idx):
        if self.keeps == "Lightning optimizer" and self.kept is None:
            self.kept = self.optimizers()[0]
        for i, optimizer in enumerate(self.optimizers()):
            optimizer = self.kept if i == 0 and self.kept is not None else optimizer
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def on_train_epoch_end(self):
        for scheduler in self.lr_schedulers():
            scheduler.step()


class Trace(Callback):
    """What each optimizer step really was: (optimizer's class, its rate). Stands behind the switch in the list."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float]] = []
        self.hooked: list[Any] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for optimizer in trainer.optimizers:
            if not any(optimizer is known for known in self.hooked):
                self.hooked.append(optimizer)
                optimizer.register_step_pre_hook(
                    lambda o, *_: self.steps.append((type(o).__name__, o.param_groups[0]["lr"]))
                )

    def rates(self, name: str = "SGD") -> list[float]:
        return [rate for kind, rate in self.steps if kind == name]


def sgd(params: Any, lr: float = 0.05) -> SGD:
    return SGD(params, lr=lr, momentum=0.9)


def when(tip: Switch) -> tuple[int, int] | None:
    """Epoch and step of the one event."""
    assert len(tip.events) <= 1
    return (tip.events[0].epoch, tip.events[0].step) if tip.events else None


def kinds(trainer: Trainer) -> list[str]:
    return [type(o).__name__ for o in trainer.optimizers]


SHORT: dict[str, Any] = {"limit_train_batches": 1, "limit_val_batches": 1}  # an epoch is one step

# ---- when

NOISY = [0.6, 0.3, 0.7, 0.1, 0.2, 0.2, 0.6, 0.1, 0.4, 0.1, 0.2, 0.7, 0.7, 0.7]


@pytest.mark.parametrize("kind", [PlateauTrigger, FluctuationTrigger])
@pytest.mark.parametrize(
    ("values", "options"),
    [
        ([1.0] * 14, {}),
        ([1.0] * 14, {"patience": 5}),
        ([1.0] * 14, {"cooldown": 3}),
        ([1.0] * 14, {"min_epochs": 7}),
        ([1 - 0.01 * t for t in range(14)], {"min_delta": 0.1}),
        (NOISY, {"smoothing": 0.5}),
        ([5.0, 4.0, 3.0, 2.0, *[1.0] * 10], {"noise_margin": 3.0}),
        ([*range(7), *[7.0] * 7], {"mode": "max"}),
    ],
)
def test_a_metric_trigger_gets_its_arguments_and_every_validation_but_the_sanity_check(kind, values, options, tmp_path):
    def fires(**options):
        trigger = kind(**options)
        return next((epoch for epoch, value in enumerate(values) if trigger.update(value, epoch)), None)

    expected = fires(**options)
    assert expected is not None
    assert not options or fires() != expected, "the case does not tell the option from its default"
    tip = Switch(sgd, trigger="plateau" if kind is PlateauTrigger else "fluctuation", **options)
    fit(tip, folder=tmp_path, module=Scripted(lambda step: values[max(step - 1, 0)]), max_epochs=14, **SHORT)
    assert when(tip) == (expected + 1, expected + 1)


@pytest.mark.parametrize(("patience", "epoch"), [(1, 1), (2, 2), (3, 2)])
def test_several_validations_in_an_epoch_all_count_and_the_switch_waits_for_the_next(patience, epoch, tmp_path):
    tip = Switch(sgd, patience=patience)
    fit(tip, folder=tmp_path, module=Scripted(), val_check_interval=0.5)
    assert when(tip) == (epoch, epoch * STEPS_A_EPOCH)


def test_validation_only_every_other_epoch(tmp_path):
    tip = Switch(sgd, patience=1)
    fit(tip, folder=tmp_path, module=Scripted(), check_val_every_n_epoch=2)
    assert when(tip) == (4, 4 * STEPS_A_EPOCH)


@pytest.mark.parametrize("validation", [True, False])
def test_a_metric_of_training_works_as_monitor(validation, tmp_path):
    tip = Switch(sgd, monitor="train_metric", patience=2)
    arguments = {} if validation else {"limit_val_batches": 0}
    fit(tip, folder=tmp_path, module=Scripted(key="train_metric"), **arguments)
    assert when(tip) == (3, 3 * STEPS_A_EPOCH)


def test_validate_between_two_fits_is_no_validation_of_the_run(tmp_path):
    tip = Switch(sgd, patience=3)
    trainer, module = build(tip, folder=tmp_path, module=Scripted(), max_epochs=2)
    with pytest.warns(UserWarning, match="There will be no switch"):
        trainer.fit(module, datamodule=PlainData())
    trainer.validate(module, datamodule=PlainData(), verbose=False)
    trainer.fit_loop.max_epochs = 6
    trainer.fit(module, datamodule=PlainData())
    assert when(tip) == (4, 4 * STEPS_A_EPOCH)


@pytest.mark.parametrize(
    ("trigger", "at", "expected"),
    [("epoch", 0, (0, 0)), ("epoch", 2, (2, 8)), ("step", 0, (0, 0)), ("step", 6, (1, 6)), ("step", 8, (2, 8))],
)
def test_a_given_time(trigger, at, expected, tmp_path):
    tip, trace = Switch(sgd, trigger=trigger, at=at), Trace()
    trainer = fit(tip, trace, folder=tmp_path)
    assert when(tip) == expected
    assert [kind for kind, _ in trace.steps] == ["Adam"] * expected[1] + ["SGD"] * (24 - expected[1])
    assert kinds(trainer) == ["SGD"]


def test_a_step_trigger_in_the_middle_of_an_epoch_with_gradient_accumulation(tmp_path):
    tip, trace = Switch(sgd, trigger="step", at=3), Trace()
    fit(tip, trace, folder=tmp_path, accumulate_grad_batches=2)
    assert when(tip) == (1, 3)
    assert [kind for kind, _ in trace.steps] == ["Adam"] * 3 + ["SGD"] * 9


def long_epochs() -> dict[str, Any]:
    data = PlainData(batch_size=1)
    data.train_dataloader = lambda: type(data.val_dataloader())(data.images[:150], data.labels[:150], 1, True)
    return {"data": data, "max_epochs": 3, "limit_val_batches": 1}


def watched_sgd(rate: float) -> Callable[[LightningModule], SGD]:
    return lambda module: SGD(module.parameters(), lr=rate)


@pytest.mark.parametrize(("lr", "min_epochs", "expected"), [("auto", 1, (2, 390)), (0.005, 3, (3, 450))])
def test_swats_switches_when_its_rate_has_settled(lr, min_epochs, expected, tmp_path):
    # Plain SGD's projection is its rate from the first look on: ready at the 30th look of ten steps, held ten times.
    tip = Switch(sgd, lr, trigger="swats", min_epochs=min_epochs)
    run = long_epochs() | {"max_epochs": min_epochs + 2}
    trainer = fit(tip, folder=tmp_path, module=Scripted(configure=watched_sgd(0.02)), **run)
    assert when(tip) == expected
    assert tip.events[0].details["swats_lr"] == pytest.approx((1 - 0.9) * 0.02, rel=1e-3)
    assert tip.events[0].details["lr"] == (lr if lr != "auto" else tip.events[0].details["swats_lr"])
    assert trainer.optimizers[0].param_groups[0]["lr"] == tip.events[0].details["lr"]


# ---- to what


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


# ---- several switches, several optimizers


@pytest.mark.parametrize("index", [0, 1])
def test_one_of_two_optimizers_in_manual_optimization(index, tmp_path):
    tip, trace = Switch(lambda p: SGD(p, lr=0.1), trigger="epoch", at=2, optimizer_index=index), Trace()
    trainer = fit(tip, trace, folder=tmp_path, module=Gan(), max_epochs=4)
    assert kinds(trainer) == ["SGD", "Adam"] if index == 0 else ["Adam", "SGD"]
    assert trainer.global_step == 4 * STEPS_A_EPOCH * 2
    assert trace.rates() == pytest.approx([0.025] * 4 + [0.0125] * 4)  # the module steps the moved schedulers
    owners = [c.scheduler.optimizer for c in trainer.lr_scheduler_configs]
    assert all(a is b for a, b in zip(owners, trainer.optimizers, strict=True))


def test_warm_up_counts_the_steps_of_its_own_optimizer(tmp_path):
    tip = Switch(lambda p: SGD(p, lr=0.1), trigger="epoch", at=1, warmup_steps=4, optimizer_index=1)
    trace = Trace()
    fit(tip, trace, folder=tmp_path, module=Gan(scheduler=lambda o: S.ConstantLR(o, 1.0)), max_epochs=2)
    assert trace.rates() == pytest.approx([0.025, 0.05, 0.075, 0.1])


def test_both_of_two_optimizers(tmp_path):
    tips = [Switch(sgd, trigger="epoch", at=1, optimizer_index=i) for i in (0, 1)]
    assert kinds(fit(*tips, folder=tmp_path, module=Gan(), max_epochs=2)) == ["SGD", "SGD"]


@pytest.mark.parametrize(("keeps", "at"), [("torch optimizer", 0), ("torch optimizer", 1), ("Lightning optimizer", 1)])
def test_a_module_that_keeps_its_own_optimizer_gets_an_error(keeps, at, tmp_path):
    with pytest.raises(RuntimeError, match=r"Gan steps the Adam that was replaced.*Get it from self\.optimizers"):
        fit(Switch(sgd, trigger="epoch", at=at), folder=tmp_path, module=Gan(keeps=keeps), max_epochs=4)


def test_a_module_that_hands_out_the_same_optimizer_again_can_fit_again(tmp_path):
    module = Scripted()
    ready_made = Adam(module.parameters())
    module.configure = lambda _: ready_made
    for _ in range(2):
        tip = Switch(sgd, lr="auto", trigger="epoch", at=3)
        fit(tip, folder=tmp_path, module=module, max_epochs=4)
        assert when(tip) == (3, 12)
    assert len(ready_made._optimizer_step_pre_hooks) == len(ready_made._optimizer_step_post_hooks) == 0


def test_there_and_back(tmp_path):
    there = Switch(sgd, trigger="epoch", at=1)
    back = Switch(lambda p: Adam(p, lr=1e-4), trigger="step", at=10)
    trace = Trace()
    trainer = fit(there, back, trace, folder=tmp_path)
    assert [kind for kind, _ in trace.steps] == ["Adam"] * 4 + ["SGD"] * 6 + ["Adam"] * 14
    assert [tip.events[0].what for tip in (there, back)] == ["Adam -> SGD", "SGD -> Adam"]
    assert len(trainer.lr_scheduler_configs) == 1


def test_in_a_chain_of_plateaus_each_waits_for_the_one_before(tmp_path):
    chain = [Switch(lambda p, lr=lr: sgd(p, lr), patience=2) for lr in (0.1, 0.01, 0.001)]
    assert len({tip.state_key for tip in chain}) == 3
    trainer = fit(*chain, folder=tmp_path, module=Scripted(), max_epochs=12, **SHORT)
    assert [when(tip) for tip in chain] == [(3, 3), (6, 6), (9, 9)]
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.001
    assert chain[1].describe().startswith("SGD -> SGD (lr 0.01)")


def test_the_projection_of_a_later_switch_watches_the_optimizer_before_it(tmp_path):
    first = Switch(lambda p: SGD(p, lr=0.03), trigger="step", at=10)
    second = Switch(sgd, lr="auto", trigger="step", at=31)
    fit(first, second, folder=tmp_path, module=Scripted(), max_epochs=10)
    assert second.events[0].details["lr"] == pytest.approx(0.003, rel=1e-3)


@pytest.mark.parametrize("trigger", ["epoch", "step"])
def test_a_chain_in_the_wrong_order_is_refused(trigger, tmp_path):
    chain = [Switch(sgd, trigger=trigger, at=4), Switch(Adam, trigger=trigger, at=2)]
    with pytest.raises(MisconfigurationException, match="each later than the one before"):
        fit(*chain, folder=tmp_path)


# ---- beside what


def fp16_on_cpu() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


@pytest.mark.parametrize(
    ("arguments", "others"),
    [
        (lambda: {"precision": "bf16-mixed"}, []),
        (lambda: {"plugins": [fp16_on_cpu()]}, []),
        (lambda: {"gradient_clip_val": 0.01}, []),
        (dict, [lambda: EMAWeightAveraging(decay=0.9)]),
    ],
    ids=["bf16", "fp16", "clipping", "EMA"],
)
def test_works_beside(arguments, others, tmp_path):
    tip, trace = Switch(sgd, trigger="step", at=6), Trace()
    trainer = fit(tip, trace, *(make() for make in others), folder=tmp_path, max_epochs=3, **arguments())
    assert [kind for kind, _ in trace.steps] == ["Adam"] * 6 + ["SGD"] * 6
    assert all(p.isfinite().all() for p in trainer.lightning_module.parameters())


@pytest.mark.parametrize("first", [True, False])
def test_works_beside_the_learning_rate_finder(first, tmp_path):
    class Found(PlainModule):
        lr = 1e-3

    tip, trace, finder = Switch(sgd, 0.1, trigger="epoch", at=4), Trace(), LearningRateFinder(num_training_steps=20)
    trainer = fit(*((finder, tip) if first else (tip, finder)), trace, folder=tmp_path, module=Found())
    assert trainer.lightning_module.lr != 1e-3
    assert trace.rates("Adam")[-1] == pytest.approx(trainer.lightning_module.lr / 2)
    assert trace.rates()[0] == pytest.approx(0.05)  # half of the full rate, as the schedule has come down by half


def test_stochastic_weight_averaging_is_refused_before_the_first_step(tmp_path):
    trace = Trace()
    with pytest.raises(MisconfigurationException, match=r"cannot work together.*EMAWeightAveraging"):
        fit(Switch(sgd, trigger="epoch", at=1), StochasticWeightAveraging(1e-2), trace, folder=tmp_path)
    assert trace.steps == []


@pytest.mark.parametrize(
    ("arguments", "unread"),
    [
        ({"trigger": "epoch", "at": 1, "patience": 5, "mode": "max"}, "mode, patience"),
        ({"trigger": "step", "at": 1, "min_epochs": 2}, "min_epochs"),
        ({"trigger": "swats", "patience": 5}, "patience"),
        ({"trigger": "plateau", "tolerance": 0.2}, "tolerance"),
    ],
)
def test_arguments_that_the_trigger_does_not_look_at_are_named(arguments, unread):
    with pytest.warns(UserWarning, match=f"does not look at {unread}\\."):
        Switch(sgd, **arguments)


@pytest.mark.parametrize("arguments", [{"patience": 5}, {"patience": 1, "cooldown": 4}, {"min_epochs": 6}])
def test_a_plateau_that_cannot_come_in_time_is_announced(arguments, tmp_path):
    with pytest.warns(UserWarning, match="There will be no switch: .* the run ends after 6"):
        fit(Switch(sgd, **arguments), folder=tmp_path)


def test_switches_to_one_target_on_two_metrics_are_two(tmp_path):
    tips = [Switch(sgd, monitor=metric, patience=1, mode="max") for metric in ("val_loss", "val_acc")]
    assert len({tip.state_key for tip in tips}) == 2
