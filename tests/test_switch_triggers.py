"""When `OptimizerSwitchCallback` switches: each trigger, at each validation, epoch and step."""

import pytest

from lightning_tips import OptimizerSwitchCallback as Switch
from lightning_tips.optimizer import FluctuationTrigger, PlateauTrigger

from harness import STEPS_A_EPOCH, PlainData, build, fit
from switching import SHORT, Scripted, Trace, kinds, long_epochs, sgd, watched_sgd, when

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
