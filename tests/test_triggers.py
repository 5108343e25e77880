"""The triggers of the optimizer switch: what they fire on, what they do not fire on, and that they resume exactly."""

import importlib.util
import json
import math
import random
from pathlib import Path

import pytest

from lightning_tips.optimizer.triggers import FluctuationTrigger, MetricTrigger, PlateauTrigger

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "optimizer" / "triggers.py"
SMOOTH = {
    "power law": [(t + 1) ** -0.5 for t in range(60)],
    "steep power law": [(t + 1) ** -2.0 for t in range(60)],
    "exponential": [math.exp(-t / 5) for t in range(60)],
    "linear": [5 - 0.01 * t for t in range(60)],
}

both = pytest.mark.parametrize("kind", [PlateauTrigger, FluctuationTrigger])
patiences = pytest.mark.parametrize("patience", [1, 2, 3, 5, 8])


def fires_at(trigger: MetricTrigger, values: list[float]) -> int | None:
    """Index of the first value at which the trigger fires, one validation per epoch."""
    return next((epoch for epoch, value in enumerate(values) if trigger.update(value, epoch)), None)


def noisy(values: list[float], sigma: float, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [value + rng.gauss(0, sigma) for value in values]


@both
@patiences
@pytest.mark.parametrize("level", [0.0, 0.1, -3.7, 1e9])
def test_a_constant_metric_fires_after_exactly_patience_values(kind, patience, level):
    assert fires_at(kind(patience=patience), [level] * 20) == patience


@both
@patiences
@pytest.mark.parametrize("curve", SMOOTH)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_smooth_improving_metric_never_fires(kind, patience, curve, mode):
    values = SMOOTH[curve] if mode == "min" else [1 - value for value in SMOOTH[curve]]
    assert fires_at(kind(patience=patience, mode=mode), values) is None


@patiences
@pytest.mark.parametrize("slowing", [0.5, 0.8, 1.0])
def test_plateau_counts_patience_from_the_moment_a_smooth_curve_stops(patience, slowing):
    values = [0.0]
    for step in range(12):
        values.append(values[-1] - slowing**step)
    assert fires_at(PlateauTrigger(patience=patience), values + values[-1:] * 20) == 12 + patience


@both
def test_the_mode_says_which_way_is_better(kind):
    rising = [0.1 * t for t in range(10)]
    assert fires_at(kind(mode="max"), rising) is None
    assert fires_at(kind(mode="min"), rising) == 3


@both
def test_overfitting_fires_and_keeps_firing(kind):
    trigger = kind()
    assert fires_at(trigger, [5.0, 4.0, 3.0, 2.0, 1.0]) is None
    fired = [trigger.update(1.0 + 0.05 * t, 5 + t) for t in range(12)]
    assert True in fired[:5]
    assert all(fired[5:])


@both
@pytest.mark.parametrize("period", [[1, -1], [1, 0, -1], [0, 1, 0, -1], [0, 1, 2]])
def test_oscillation_fires(kind, period):
    assert fires_at(kind(), [float(v) for v in period] * 5) <= 5


@both
@pytest.mark.parametrize("at", range(2, 20))
def test_one_bad_validation_does_not_fire(kind, at):
    values = noisy([20.0 - t for t in range(20)], 0.1, seed=at)
    values[at] += 15
    assert fires_at(kind(), values) is None


@both
def test_a_sudden_drop_does_not_fire(kind):
    assert fires_at(kind(), noisy([20.0 - t - (50 if t >= 8 else 0) for t in range(20)], 0.1)) is None


def test_patience_decides_how_small_an_improvement_plateau_sees():
    values = noisy([-0.75 * t for t in range(30)], 1.0)
    assert fires_at(PlateauTrigger(patience=3), values) is not None
    assert fires_at(PlateauTrigger(patience=8), values) is None


def test_fluctuation_fires_on_a_sure_improvement_that_is_small_against_the_noise():
    values = noisy([-0.4 * t for t in range(30)], 1.0)
    assert fires_at(PlateauTrigger(patience=10), values) is None
    assert fires_at(FluctuationTrigger(patience=10), values) is not None


@both
def test_min_delta_is_the_improvement_needed_over_patience_validations(kind):
    values = [-0.1 * t for t in range(20)]
    assert fires_at(kind(patience=4, min_delta=0.39), values) is None
    assert fires_at(kind(patience=4, min_delta=0.41), values) == 4


@both
def test_a_noise_margin_of_zero_looks_at_the_slope_alone(kind):
    values = [3.0, 0.0, 3.0, 0.0, 2.9, 0.0]
    assert fires_at(kind(patience=4), values) is not None
    assert fires_at(kind(patience=4, noise_margin=0.0), values) is None


@both
def test_only_the_values_in_the_window_count(kind):
    values = [9.0, 5.0, 4.0, 3.0] + [2.0] * 10
    assert fires_at(kind(window=3), values) < fires_at(kind(window=6), values)


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_skipped_and_counted(kind, bad):
    trigger = kind(smoothing=0.3)
    clean = kind(smoothing=0.3)
    for epoch, value in enumerate(noisy(SMOOTH["exponential"], 0.05)):
        assert trigger.update(bad, epoch) is False
        assert trigger.update(value, epoch) is clean.update(value, epoch)
        assert trigger.nan_count == epoch + 1
    assert clean.nan_count == 0


@both
def test_nothing_but_nan_never_fires(kind):
    assert fires_at(kind(), [math.nan] * 30) is None


@both
def test_a_diverged_run_raises_nothing(kind):
    trigger = kind()
    for epoch, value in enumerate([1.0, 1e200, 0.9, -1e308, 1e308, 0.7, 3e38]):
        trigger.update(value, epoch)


@both
def test_cooldown_ignores_the_first_values_and_those_after_a_reset(kind):
    trigger = kind(cooldown=4)
    assert fires_at(trigger, [1.0] * 20) == 4 + 3
    trigger.update(math.nan, 20)
    trigger.reset()
    assert trigger.nan_count == 0
    assert fires_at(trigger, [1.0] * 20) == 4 + 3


@both
def test_min_epochs_counts_epochs_and_not_validations(kind):
    assert fires_at(kind(min_epochs=10), [1.0] * 20) == 9  # index 9 is epoch number 10
    trigger = kind(min_epochs=10)
    fired = [trigger.update(1.0, epoch) for epoch in range(12) for _ in range(4)]
    assert fired.index(True) == 9 * 4


def test_smoothing_is_a_bias_corrected_moving_average():
    trigger = PlateauTrigger(smoothing=0.5)
    for epoch, value in enumerate([4.0, 1.0, 7.0]):
        trigger.update(value, epoch)
    assert trigger.state_dict()["values"] == pytest.approx([4, (4 + 2 * 1) / 3, (4 + 2 * 1 + 4 * 7) / 7])


@both
@pytest.mark.parametrize("arguments", [{}, {"smoothing": 0.6, "cooldown": 3, "mode": "max", "window": 4}])
def test_a_resumed_trigger_decides_identically_from_every_point(kind, arguments):
    values = noisy(SMOOTH["exponential"][:25] + SMOOTH["exponential"][24:25] * 15, 0.01)
    values[7] = math.nan
    whole = kind(**arguments)
    states, decisions = [], []
    for epoch, value in enumerate(values):
        states.append(json.dumps(whole.state_dict()))  # plain types only, and a copy
        decisions.append(whole.update(value, epoch))
    assert len(set(decisions)) == 2
    for start, state in enumerate(states):
        resumed = kind(**arguments)
        resumed.load_state_dict(json.loads(state))
        rest = [resumed.update(value, epoch) for epoch, value in enumerate(values[start:], start)]
        assert rest == decisions[start:]
        assert resumed.state_dict() == whole.state_dict()


@both
def test_the_state_is_plain_and_no_view_of_the_trigger(kind):
    class Scalar:  # stands for a tensor without dimensions
        def __float__(self):
            return 1.5

    trigger = kind()
    trigger.update(Scalar(), 0)
    state = trigger.state_dict()
    assert {type(value) for value in state.values()} <= {int, float, list}
    assert [type(value) for value in state["values"]] == [float]
    trigger.update(1.0, 1)
    assert state["values"] == [1.5]


@both
@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"mode": "minimum"}, '"min" for a loss or "max"'),
        ({"patience": 0}, "patience=0: use 1 or more"),
        ({"smoothing": 1.0}, r"smoothing=1.0: use a factor in \[0, 1\)"),
        ({"smoothing": -0.1}, r"smoothing=-0.1: use a factor in \[0, 1\)"),
        ({"min_delta": -0.1}, "min_delta=-0.1: use 0 or a positive"),
        ({"min_delta": math.nan}, "min_delta=nan: use 0 or a positive"),
        ({"cooldown": -1}, "cooldown=-1: use 0 or a positive"),
        ({"min_epochs": -1}, "min_epochs=-1: use 0 or a positive"),
        ({"noise_margin": -1.0}, "noise_margin=-1.0: use 0 or a positive"),
        ({"window": 2}, "window=2: use 3 or more"),
    ],
)
def test_an_argument_outside_its_domain_says_what_to_do(kind, arguments, advice):
    with pytest.raises(ValueError, match=advice):
        kind(**arguments)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_triggers", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@both
def test_no_false_alarm_and_19_of_20_stalls_caught_with_the_defaults(benchmark, kind):
    measured = benchmark.headline(kind.__name__, n=200, seeds=1)
    assert measured["false_alarms"]["improving"] == [0]
    assert min(measured["caught"]["flat or oscillating"]["rates"]) >= 0.95


def test_the_benchmark_runs_and_writes_its_result(benchmark, tmp_path, capsys):
    benchmark.main(["--curves", "4", "--seeds", "1", "--out", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["families"].keys() == benchmark.FAMILIES.keys()
    assert "PlateauTrigger" in capsys.readouterr().out


def test_the_committed_result_belongs_to_this_benchmark(benchmark):
    committed = json.loads(BENCHMARK.with_suffix(".json").read_text())
    assert committed["families"] == benchmark.FAMILIES
    assert committed["setting"]["patience"] == benchmark.PATIENCE
    for kind in ("PlateauTrigger", "FluctuationTrigger"):
        assert set(committed["arms"][kind]["false_alarms"]["improving"]) == {0}
        assert min(committed["arms"][kind]["caught"]["flat or oscillating"]["rates"]) >= 0.95
