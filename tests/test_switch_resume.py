"""`OptimizerSwitchCallback` across a resume, which is exact to the bit, and what it says to wrong input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, Adam, Muon
from torch.optim import lr_scheduler as S

from lightning_tips import OptimizerSwitchCallback as Switch

from harness import STEPS_A_EPOCH, PlainData, PlainModule, assert_same, bits, build, every_epoch, fit
from switching import Gan, Scripted, Trace, kinds, long_epochs, sgd, watched_sgd, when

# The checkpoints were written by a run that kept more of them, or that had another switch.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

# ---- resume


def check_resume(
    make: Callable[[], list[Switch]],
    folder: Path,
    steps: list[int],
    epochs: list[int] = [],  # noqa: B006
    module: Callable[[], LightningModule] = PlainModule,
    every: int = 1,
    **arguments: Any,
) -> None:
    """From each of these checkpoints, the run ends with the bits of the run that was not killed."""
    run = {"folder": folder, **arguments}
    tips = make()
    steps_kept = ModelCheckpoint(folder / "kept", "step-{step}", save_top_k=-1, every_n_train_steps=every)
    expected = bits(fit(*tips, steps_kept, every_epoch(folder / "kept"), module=module(), **run))
    assert all(tip.events for tip in tips)
    names = [f"step-step={step}.ckpt" for step in steps] + [f"epoch-epoch={epoch}.ckpt" for epoch in epochs]
    for name in names:
        torch.load(folder / "kept" / name, weights_only=True)
        resumed = fit(*make(), module=module(), ckpt_path=folder / "kept" / name, **run)
        assert_same(bits(resumed), expected, name)


# Checkpoints of the last batch of an epoch are left out where a metric decides: Lightning resumes from them without the
# validation that was to come, so a value is missed.
WITHIN_EPOCHS = [2, 7, 9, 14]


@pytest.mark.parametrize("trigger", ["plateau", "fluctuation"])
def test_resume_around_a_switch_that_a_metric_decided(trigger, tmp_path):
    check_resume(
        lambda: [Switch(sgd, trigger=trigger, patience=1)],  # type: ignore[arg-type]
        tmp_path,
        WITHIN_EPOCHS,
        epochs=[0, 1, 2],  # decided at the end of 1, switched in 2
        module=Scripted,
    )


def test_resume_from_a_decision_taken_in_the_middle_of_an_epoch(tmp_path):
    make = lambda: [Switch(sgd, patience=2)]  # noqa: E731  decided in epoch 1, between its second and its third step
    check_resume(make, tmp_path, [3, 5, 6, 7, 9], module=Scripted, val_check_interval=0.5)


def test_resume_around_a_metric_of_training(tmp_path):
    make = lambda: [Switch(sgd, monitor="train_metric", patience=1)]  # noqa: E731
    check_resume(make, tmp_path, [2, 6, 9], [0, 1, 2], module=lambda: Scripted(key="train_metric"))


def test_resume_around_a_switch_in_the_middle_of_an_epoch(tmp_path):
    check_resume(lambda: [Switch(sgd, trigger="step", at=6)], tmp_path, [1, 4, 5, 6, 7, 8, 13])


def test_resume_with_gradient_accumulation(tmp_path):
    check_resume(lambda: [Switch(sgd, trigger="step", at=3)], tmp_path, [2, 3, 4], accumulate_grad_batches=2)


def test_resume_around_an_automatic_rate(tmp_path):
    make = lambda: [Switch(sgd, lr="auto", trigger="step", at=23)]  # noqa: E731  looks at steps 10 and 20
    check_resume(make, tmp_path, [5, 10, 15, 22, 23, 25], max_epochs=7)


def test_resume_while_the_projection_settles(tmp_path):
    make = lambda: [Switch(sgd, lr="auto", trigger="swats")]  # noqa: E731
    run = long_epochs()
    module = lambda: Scripted(configure=watched_sgd(0.02))  # noqa: E731
    check_resume(make, tmp_path, [325, 390], module=module, every=65, **run)


def test_resume_in_the_middle_of_the_warm_up(tmp_path):
    make = lambda: [Switch(sgd, trigger="epoch", at=1, warmup_steps=7)]  # noqa: E731
    check_resume(make, tmp_path, [3, 4, 5, 9, 11, 12])


@pytest.mark.parametrize(
    ("make", "interval", "steps"),
    [
        # A resumed Lightning never steps a ReduceLROnPlateau at the end of its first epoch, with or without a switch.
        (lambda o: S.ReduceLROnPlateau(o, patience=0), "epoch", [3]),
        (lambda o: S.OneCycleLR(o, 0.1, total_steps=18), "step", [3, 6, 7, 8, 14]),
        (
            lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1, total_iters=3), S.ExponentialLR(o, 0.9)], [3]),
            "step",
            [6, 7, 14],
        ),
    ],
)
def test_resume_with_a_new_scheduler(make, interval, steps, tmp_path):
    tips = lambda: [Switch(sgd, 0.1, make, "step", 6, lr_scheduler_interval=interval)]  # noqa: E731
    check_resume(tips, tmp_path, steps)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1, total_iters=3), S.CosineAnnealingLR(o, 5, 1e-5)], [3]),
        lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.5, 4), S.ExponentialLR(o, 0.9)]),
        lambda o: S.CosineAnnealingWarmRestarts(o, 2, 2, 1e-5),
        lambda o: S.OneCycleLR(o, 0.01, total_steps=24),
    ],
)
def test_resume_with_a_schedule_that_goes_on_or_is_dropped(make, tmp_path):
    def configure(module):
        optimizer = Adam(module.parameters(), lr=1e-3)
        return [optimizer], [{"scheduler": make(optimizer), "interval": "step"}]

    tips = lambda: [Switch(sgd, trigger="step", at=6)]  # noqa: E731
    check_resume(tips, tmp_path, [5, 6, 7, 14], module=lambda: Scripted(configure=configure))


def test_resume_in_a_chain(tmp_path):
    def make():
        there, back = Switch(sgd, trigger="epoch", at=1), Switch(Adam, 1e-4, trigger="step", at=10, warmup_steps=3)
        return [there, back, Switch(sgd, lr="auto", trigger="step", at=21)]

    check_resume(make, tmp_path, [2, 4, 6, 10, 11, 15, 21, 22])


def test_resume_in_a_chain_of_plateaus(tmp_path):
    make = lambda: [Switch(lambda p, lr=lr: sgd(p, lr), patience=1) for lr in (0.1, 0.01)]  # noqa: E731
    check_resume(make, tmp_path, [6, 9, 17], [1, 2, 3], module=Scripted)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_resume_in_manual_optimization(tmp_path):
    make = lambda: [Switch(sgd, trigger="epoch", at=1, warmup_steps=6, optimizer_index=1)]  # noqa: E731
    # Not at the end of an epoch, where the module steps its schedulers: Lightning skips its hook on resume.
    check_resume(make, tmp_path, [6, 10, 20], module=Gan)


def test_trainer_goes_on_after_a_resumed_run_that_switched(tmp_path):
    fit(Switch(sgd, trigger="epoch", at=2), every_epoch(tmp_path), folder=tmp_path)
    trainer, module = build(tip := Switch(sgd, trigger="epoch", at=2), folder=tmp_path)
    trainer.fit(module, datamodule=PlainData(), ckpt_path=tmp_path / "epoch-epoch=0.ckpt")
    assert when(tip) is not None
    trainer.fit_loop.max_epochs = 7
    trainer.fit(module, datamodule=PlainData())
    assert kinds(trainer) == ["SGD"]


def test_a_run_without_the_switch_goes_on_with_it(tmp_path):
    fit(every_epoch(tmp_path), folder=tmp_path, max_epochs=2)
    tip = Switch(sgd, trigger="epoch", at=3)
    trainer = fit(tip, folder=tmp_path, ckpt_path=tmp_path / "epoch-epoch=1.ckpt")
    assert (when(tip), kinds(trainer)) == ((3, 12), ["SGD"])


def test_weights_only_checkpoint_starts_a_new_run(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    fit(Switch(sgd, trigger="epoch", at=1), keep, folder=tmp_path, max_epochs=2)
    with pytest.raises(KeyError, match="save_weights_only"):  # Lightning's
        fit(Switch(sgd, trigger="epoch", at=1), folder=tmp_path, ckpt_path=tmp_path / "weights.ckpt")
    module = PlainModule()
    module.load_state_dict(torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"])
    tip = Switch(sgd, trigger="epoch", at=1)
    fit(tip, folder=tmp_path, module=module, max_epochs=2)
    assert when(tip) == (1, 4)


@pytest.mark.parametrize("other", [{"at": 3}, {"lr": 0.7}, {"optimizer": lambda p: sgd(p, 0.7)}])
def test_a_checkpoint_of_another_switch_is_refused(other, tmp_path):
    fit(Switch(sgd, trigger="epoch", at=1), every_epoch(tmp_path), folder=tmp_path, max_epochs=2)
    tip = Switch(**{"optimizer": sgd, "trigger": "epoch", "at": 1} | other)
    with pytest.raises(MisconfigurationException, match=r"was written after the switch of .*arguments"):
        fit(tip, folder=tmp_path, ckpt_path=tmp_path / "epoch-epoch=1.ckpt", max_epochs=4)


def test_a_checkpoint_of_another_optimizer_of_the_module_is_refused(tmp_path):
    fit(every_epoch(tmp_path), folder=tmp_path, module=Scripted(configure=watched_sgd(0.1)), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="holds another optimizer than Adam"):
        fit(Switch(sgd, trigger="epoch", at=3), folder=tmp_path, ckpt_path=tmp_path / "epoch-epoch=0.ckpt")


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("switched"),
        lambda state: state.pop("events"),
        lambda state: state.update(events=[{"tip": "optimizer"}]),
        lambda state: state.update(steps="many"),
        lambda state: state.update(rate="fast"),
        lambda state: state.update(parts={}),
        lambda state: state["parts"].update(stall=7),
    ],
)
def test_a_damaged_state_is_named(damage, tmp_path):
    make = lambda: Switch(sgd, patience=2)  # noqa: E731
    fit(make(), every_epoch(tmp_path), folder=tmp_path, max_epochs=4)
    checkpoint = torch.load(tmp_path / "epoch-epoch=0.ckpt", weights_only=True)
    damage(checkpoint["callbacks"][make().state_key])
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(MisconfigurationException, match="state of OptimizerSwitchCallback is damaged"):
        fit(make(), folder=tmp_path, ckpt_path=tmp_path / "damaged.ckpt")


# ---- wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trigger": "plataeu"}, "Did you mean 'plateau'"),
        ({"trigger": "epoch"}, "needs at=<a number>"),
        ({"trigger": "plateau", "at": 3}, "needs no `at`"),
        ({"trigger": "step", "at": -1}, "lies before the start"),
        ({"lr": 0.0}, "no learning rate"),
        ({"lr": float("nan")}, "no learning rate"),
        ({"lr": "fast"}, "no learning rate"),
        ({"weight_decay": "kep"}, "Did you mean 'keep'"),
        ({"lr_scheduler_interval": "epochs"}, "Did you mean 'epoch'"),
        ({"warmup_steps": -1}, "must be 0 or more"),
        ({"optimizer_index": -1}, "must be 0 or more"),
        ({"mode": "least"}, 'use "min"'),
        ({"patience": 0}, "use 1 or more"),
        ({"trigger": "swats", "tolerance": 0.0}, "must be above 0"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Switch(**arguments)


def refused_before_the_first_step(tip: Switch, folder: Path, message: str, *more: Callback, **arguments: Any) -> None:
    trace = Trace()
    with pytest.raises(MisconfigurationException, match=message):
        fit(tip, *more, trace, folder=folder, **arguments)
    assert trace.steps == []


def test_an_optimizer_that_refuses_the_parameters(tmp_path):
    refused_before_the_first_step(Switch(Muon, 0.1, trigger="epoch", at=2), tmp_path, "some take matrices only")


def test_an_automatic_rate_for_another_optimizer_than_sgd(tmp_path):
    refused_before_the_first_step(Switch(Adam, "auto", trigger="epoch", at=2), tmp_path, "projects a rate for SGD, not")


def test_no_such_optimizer(tmp_path):
    tip = Switch(sgd, trigger="epoch", at=2, optimizer_index=1)
    refused_before_the_first_step(tip, tmp_path, r"no optimizer 1 to switch from: PlainModule configures \['Adam'\]")


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_a_module_without_optimizer(tmp_path):
    module = Scripted(configure=lambda _: None)
    refused_before_the_first_step(Switch(sgd, trigger="epoch", at=2), tmp_path, "configures none", module=module)


def test_a_schedule_that_cannot_follow_in_manual_optimization(tmp_path):
    def one_cycle(optimizer):
        return S.OneCycleLR(optimizer, 0.01, total_steps=9)

    refused_before_the_first_step(
        Switch(sgd, trigger="epoch", at=2), tmp_path, "OneCycleLR cannot follow to SGD", module=Gan(one_cycle)
    )
    tip = Switch(sgd, 0.1, one_cycle, trigger="epoch", at=2)
    assert kinds(fit(tip, folder=tmp_path, module=Gan(one_cycle))) == ["SGD", "Adam"]


def test_no_validation_at_all(tmp_path):
    refused_before_the_first_step(Switch(sgd), tmp_path, "no validation runs", limit_val_batches=0)


def test_a_misspelt_validation_metric_is_named_at_the_sanity_check(tmp_path):
    tip = Switch(sgd, monitor="val_lss")
    refused_before_the_first_step(tip, tmp_path, "waits for 'val_lss', which nobody logs. Did you mean 'val_loss'")


@pytest.mark.parametrize(("monitor", "sanity"), [("val_lss", 0), ("accuracy", 1)])
def test_a_missing_metric_is_named_in_the_second_epoch_after_the_first_checkpoint(monitor, sanity, tmp_path):
    trace = Trace()
    with pytest.raises(MisconfigurationException, match=f"waits for '{monitor}', which nobody logs"):
        fit(Switch(sgd, monitor=monitor), trace, every_epoch(tmp_path), folder=tmp_path, num_sanity_val_steps=sanity)
    assert len(trace.steps) == STEPS_A_EPOCH
    assert (tmp_path / "epoch-epoch=0.ckpt").exists()


@pytest.mark.parametrize("name", ["value_loss", "interval_loss"])
def test_val_within_a_word_does_not_make_a_validation_metric(name, tmp_path):
    class Valued(Scripted):
        def training_step(self, batch, batch_idx):
            self.log(name, 1.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    for arguments in ({}, {"limit_val_batches": 0}):
        tip = Switch(sgd, monitor=name, patience=1)
        fit(tip, folder=tmp_path, module=Valued(), **arguments)
        assert when(tip) == (2, 8)


def test_nan_is_neither_an_improvement_nor_a_plateau_and_warns(tmp_path):
    never = Switch(sgd, patience=1)
    with pytest.warns(UserWarning, match=r"val_loss is nan in epoch \d; OptimizerSwitchCallback passes over it"):
        fit(never, folder=tmp_path, module=Scripted(lambda step: float("nan")))
    assert when(never) is None
    later = Switch(sgd, patience=1)
    with pytest.warns(UserWarning, match="val_loss is nan in epoch 1"):
        fit(later, folder=tmp_path, module=Scripted(lambda step: float("nan") if step == 8 else 1.0))
    assert when(later) == (3, 12)


@pytest.mark.parametrize("trigger", ["plateau", "fluctuation"])
def test_warns_when_early_stopping_comes_first(trigger, tmp_path):
    tip = Switch(sgd, trigger=trigger, patience=3)
    with pytest.warns(UserWarning, match="EarlyStopping on val_loss with patience 3 ends the run before the switch"):
        fit(tip, EarlyStopping("val_loss", patience=3), folder=tmp_path, module=Scripted(), max_epochs=9)
    assert when(tip) is None
    patient = Switch(sgd, trigger=trigger, patience=3)
    fit(patient, EarlyStopping("val_loss", patience=6), folder=tmp_path, module=Scripted(), max_epochs=9)
    assert when(patient) == (4, 16)


@pytest.mark.parametrize(("trigger", "at", "run"), [("epoch", 6, {}), ("step", 9, {"max_steps": 9})])
def test_warns_when_the_run_ends_before_the_given_time(trigger, at, run, tmp_path, capsys):
    with pytest.warns(UserWarning, match=f"There will be no switch: it is set for {trigger} {at}, and the run ends"):
        fit(Switch(sgd, trigger=trigger, at=at), folder=tmp_path, **run)
    assert "no switch: the moment for Adam -> SGD" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_the_first_optimizer_of_a_fit_that_failed_can_be_used_again(tmp_path):
    module = Scripted()
    ready_made = SGD(module.parameters(), lr=0.1)
    module.configure = lambda _: ready_made

    class Fails(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(Switch(sgd, trigger="step", at=2), Fails(), folder=tmp_path, module=module)
    fit(folder=tmp_path, module=module, max_epochs=1)
