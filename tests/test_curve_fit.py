"""The learning curve: what it says far out, how sure it is, and when it says nothing."""

import numpy as np
import pytest

from lightning_tips import fit_learning_curve
from lightning_tips.data import NoCurveError

SIZES = [125, 250, 500, 1000, 2000, 4000]


def scores(sizes, c=0.93, a=0.9, b=0.35, noise=0.003, seeds=3, rng=0):
    """Accuracies (I, seeds) of a power law, with noise that shrinks with the size."""
    n = np.asarray(sizes, float)[:, None]
    stray = np.random.default_rng(rng).normal(size=(len(sizes), seeds))
    return c - a * n**-b + noise * (n / n[-1]) ** -0.25 * stray


def test_a_power_law_is_found_far_out_and_better_than_by_a_line_over_log_n() -> None:
    measured = scores(SIZES)
    curve = fit_learning_curve(SIZES, measured)
    truth = 0.93 - 0.9 * 40_000**-0.35
    line = np.polyval(np.polyfit(np.log(SIZES), measured.mean(1), 1), np.log(40_000))
    assert abs(curve.predict(40_000) - truth) < 0.01 < abs(line - truth)
    low, high = curve.interval(40_000)
    assert low < truth < high
    assert high - low < 0.04
    # A band is wider for surer levels, for one fit, and further away; between sizes it is narrow.
    assert curve.interval(40_000, 0.5)[1] - curve.interval(40_000, 0.5)[0] < high - low
    one = curve.interval(40_000, fits=1)
    assert one[1] - one[0] > high - low
    widths = [np.ptp(curve.interval(n)) for n in (3000, 8000, 80_000)]
    assert widths == sorted(widths)
    assert curve.predict(np.array([100, 1000])).shape == (2,)
    assert curve.interval(np.array([100, 1000]))[0].shape == (2,)
    _, (least, most) = curve.levels_off_at()
    assert least < 0.93 < most <= 1
    assert curve.exponent()[1][0] < 0.35 < curve.exponent()[1][1]
    assert fit_learning_curve(SIZES, measured).interval(40_000) == (low, high)  # nothing is drawn
    shuffled = np.random.default_rng(1).permutation(18)
    flat = fit_learning_curve(np.repeat(SIZES, 3)[shuffled], measured.ravel()[shuffled])
    assert flat.interval(40_000) == pytest.approx((low, high), abs=1e-9)


def test_the_band_of_90_percent_holds_90_percent() -> None:
    """Of curves whose exponent drifts, drawn with other numbers than the prior's."""
    rng = np.random.default_rng(0)
    far = np.array([8000, 20_000, 40_000])
    held, errors = [], []
    for _ in range(10):
        b, limit, reducible = np.exp(rng.normal(np.log(0.4), 0.4)), rng.uniform(0, 0.2), rng.uniform(0.2, 0.6)
        n = np.concatenate([SIZES, far])
        logs = np.log(n / n[0])
        drift = np.cumsum(rng.normal(size=9) * 0.04 * np.sqrt(np.diff(logs, prepend=0)))
        error = limit + reducible * np.exp(-b * logs + drift)
        noise = rng.uniform(0.002, 0.01) * (n / 4000.0) ** -0.3
        accuracy = np.clip(1 - error[:, None] + noise[:, None] * rng.normal(size=(9, 3)), 0, 1)
        curve = fit_learning_curve(SIZES, accuracy[:6])
        assert not curve.abstains, curve.reason
        for m, at in zip(far, accuracy[6:].mean(1), strict=True):
            low, high = curve.interval(m, fits=3)
            held.append(low <= at <= high)
        errors.append(abs(curve.predict(40_000) - accuracy[8].mean()))
    assert 0.8 <= np.mean(held) <= 1
    assert np.mean(errors) < 0.02


def test_samples_for_a_score_come_from_the_same_band() -> None:
    curve = fit_learning_curve(SIZES, scores(SIZES, c=0.95))
    target = curve.predict(20_000)
    needed = curve.samples_for(target)
    assert needed.is_reachable
    assert needed.low < needed.median < needed.high
    assert needed.median == pytest.approx(20_000, rel=0.05)
    assert curve.interval(needed.low)[1] == pytest.approx(target, abs=2e-4)  # the band's upper end reaches it there
    assert curve.interval(needed.high)[0] == pytest.approx(target, abs=2e-4)
    assert f"{needed.median:,}" in str(needed)
    wider = curve.samples_for(target, level=0.99)
    assert wider.low < needed.low
    assert wider.high is None or wider.high > needed.high
    never = curve.samples_for(0.9999)
    assert not never.is_reachable
    assert str(never).startswith("not reachable: levels off at 0.9")
    with pytest.raises(ValueError, match="no score is better than 1"):
        curve.samples_for(1.0)
    already = curve.samples_for(0.75)
    assert already.high < 4000


def test_losses_fall_and_stay_above_zero() -> None:
    n = np.array(SIZES, float)[:, None]
    loss = 0.1 + 20 * n**-0.5 + 0.01 * np.random.default_rng(0).normal(size=(6, 3))
    curve = fit_learning_curve(SIZES, loss, mode="min")
    assert curve.predict(40_000) == pytest.approx(0.2, abs=0.05)
    assert curve.interval(10**9)[0] >= 0
    assert curve.levels_off_at()[1][0] < 0.1 < curve.levels_off_at()[1][1]
    needed = curve.samples_for(0.25)
    assert needed.low < 17_800 < needed.high
    start, (low, high) = curve.gain(4000, 8000)
    assert low < start < high
    assert start == pytest.approx(20 * (4000**-0.5 - 8000**-0.5), abs=0.03)


def test_a_metric_without_bounds() -> None:
    decibels = 100 * scores(SIZES, c=0.4, a=0.9, b=0.3)
    curve = fit_learning_curve(SIZES, decibels)
    assert curve.bounds == (None, None)
    low, high = curve.interval(40_000)
    assert low < 40 - 90 * 40_000**-0.3 < high
    bounded = fit_learning_curve(SIZES, decibels, bounds=(None, 41.0))
    assert bounded.interval(10**9)[1] <= 41
    with pytest.raises(ValueError, match="beyond the bounds"):
        fit_learning_curve(SIZES, decibels, bounds=(0.0, 1.0))


@pytest.mark.parametrize(
    ("errors", "says"),
    [
        ([0.50, 0.40, 0.32, 0.38, 0.30, 0.22], "worse from 500 to 1,000 samples.*double descent"),
        ([0.40, 0.32, 0.28, 0.26, 0.30, 0.36], "worse from 1,000 to 4,000 samples"),
        ([0.30, 0.30, 0.30, 0.30, 0.30, 0.30], "does not get better beyond its noise"),
        ([0.90, 0.89, 0.88, 0.80, 0.60, 0.30], "brings more than the one before"),
    ],
)
def test_it_abstains_on_ill_behaved_curves_and_says_why(errors, says: str) -> None:
    stray = 0.003 * np.random.default_rng(0).normal(size=(6, 3))
    curve = fit_learning_curve(SIZES, 1 - np.array(errors)[:, None] + stray)
    assert curve.abstains
    with pytest.raises(NoCurveError, match=says):
        curve.predict(8000)
    for ask in (lambda: curve.interval(8000), lambda: curve.samples_for(0.9), curve.levels_off_at):
        with pytest.raises(NoCurveError, match="abstains"):
            ask()
    assert curve.to_dict()["abstains"] == curve.reason


def test_it_abstains_with_too_few_sizes_or_too_close_ones() -> None:
    few = fit_learning_curve([100, 200, 400], [[0.5, 0.51], [0.6, 0.61], [0.7, 0.71]])
    assert "3 sizes (100, 200, 400)" in few.reason
    close = fit_learning_curve([100, 120, 140, 160], [0.5, 0.51, 0.52, 0.53])
    assert "lie too close" in close.reason


def test_small_sizes_before_the_law_begins_are_left_out() -> None:
    measured = scores([30, 60, *SIZES], noise=0.002)
    measured[:2] = [[0.10, 0.101, 0.102], [0.11, 0.111, 0.112]]  # chance
    curve = fit_learning_curve([30, 60, *SIZES], measured)
    assert not curve.abstains, curve.reason
    assert any("30 samples are left out" in note for note in curve.notes)
    assert abs(curve.predict(40_000) - (0.93 - 0.9 * 40_000**-0.35)) < 0.02


def test_one_fit_a_size_and_noiseless_scores() -> None:
    curve = fit_learning_curve(SIZES, scores(SIZES, seeds=1)[:, 0])
    assert any("one fit a size" in note for note in curve.notes)
    low, high = curve.interval(40_000)
    assert low < 0.93 - 0.9 * 40_000**-0.35 < high
    exact = fit_learning_curve(SIZES, scores(SIZES, noise=0))
    assert exact.predict(40_000) == pytest.approx(0.93 - 0.9 * 40_000**-0.35, abs=0.003)


@pytest.mark.parametrize(
    ("sizes", "values", "says"),
    [
        ([100, 200], [0.5, 0.6, 0.7], "do not fit together"),
        ([], [], "do not fit together"),
        ([100, 200], [0.5, float("nan")], "finite"),
        ([0, 200], [0.5, 0.6], "positive"),
        ([100, 100], [0.5, 0.6], "All scores are of one size, 100"),
    ],
)
def test_bad_input(sizes, values, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit_learning_curve(sizes, values)
    with pytest.raises(ValueError, match="mode='up'"):
        fit_learning_curve(SIZES, scores(SIZES), mode="up")


def test_bad_questions() -> None:
    curve = fit_learning_curve(SIZES, scores(SIZES))
    for ask, says in (
        (lambda: curve.predict(0), "n=0 must be positive"),
        (lambda: curve.interval(10, level=1.0), "level=1.0"),
        (lambda: curve.interval(10, fits=0), "fits=0"),
        (lambda: curve.gain(2000, 8000), "start=2000"),
    ):
        with pytest.raises(ValueError, match=says):
            ask()
