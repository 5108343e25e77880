"""`OptimizerSwitchCallback`: several switches, several optimizers, and beside what it works."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, Adam
from torch.optim import lr_scheduler as S

from lightning_tips import OptimizerSwitchCallback as Switch

from harness import STEPS_A_EPOCH, PlainModule, fit
from switching import SHORT, Gan, Scripted, Trace, kinds, sgd, when

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
