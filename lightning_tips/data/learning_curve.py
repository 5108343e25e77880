"""What more data would bring: a curve through the scores of a few sizes, with an honest band."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_tips.data.behaviour import FEWEST, find_fault
from lightning_tips.data.posterior import Means, Posterior, fit_posterior

__all__ = ["LearningCurve", "NoCurveError", "SamplesNeeded", "fit_learning_curve"]

Array = NDArray[np.float64]

HORIZON = 1000.0
"""Sizes are looked for up to so many times the largest one that was measured."""


class NoCurveError(ValueError):
    """A curve that abstains was asked for a number; the message is the reason."""


@dataclass(frozen=True)
class SamplesNeeded:
    """How many samples reach a score.

    Attributes:
        score: The target.
        low: With fewer it is reached with a probability below ``(1 - level) / 2``; None: not within reach.
        median: It is as likely reached as not; None: more likely not, with any number.
        high: It is reached with a probability of ``1 - (1 - level) / 2``; None: that sure one cannot be.
        level: Of the interval.
        probability: That it is reached with any number of samples.
        levels_off_at: Median of the score that no number of samples exceeds.
        levels_off_interval: Its interval.
        beyond: Where low, median or high lies beyond the horizon of 1,000 times the largest size: that horizon.
    """

    score: float
    low: int | None
    median: int | None
    high: int | None
    level: float
    probability: float
    levels_off_at: float
    levels_off_interval: tuple[float, float]
    beyond: int

    @property
    def is_reachable(self) -> bool:
        """Whether it can be reached, with a probability of at least ``(1 - level) / 2``."""
        return self.low is not None

    def __str__(self) -> str:
        off = f"levels off at {self.levels_off_at:.4g} ({_pair(self.levels_off_interval)})"
        if self.low is None:
            if self.probability < (1 - self.level) / 2:
                return f"not reachable: {off}"
            return f"not within {self.beyond:,} samples; {off}"
        if self.high is not None:
            return f"{self.low:,} to {self.high:,} samples, most likely {self.median:,}"
        likely = "" if self.median is None else f", as likely as not with {self.median:,}"
        return f"{self.low:,} samples at least{likely}; perhaps never ({self.probability:.0%} that it ever is): {off}"


@dataclass(frozen=True)
class LearningCurve:
    """The score as a function of the number of training samples; see :func:`fit_learning_curve`.

    Attributes:
        sizes: (I,) sizes that it was fitted to, in ascending order.
        scores: (I,) mean score of each.
        mode: ``"max"`` or ``"min"``.
        bounds: Least and greatest possible score; None where there is none.
        reason: Why it abstains; None: it does not.
        notes: What else one should know of the fit.
    """

    sizes: Array
    scores: Array
    mode: Literal["max", "min"]
    bounds: tuple[float | None, float | None]
    reason: str | None
    notes: tuple[str, ...]
    _posterior: Posterior | None

    @property
    def abstains(self) -> bool:
        """Whether nothing can be told."""
        return self.reason is not None

    def predict(self, n: Any) -> Any:
        """The expected score with ``n`` training samples: a float, or an array for an array.

        Raises:
            NoCurveError: If the curve abstains.
            ValueError: If ``n`` is not positive.
        """
        if np.ndim(n):
            return np.array([self.predict(one) for one in np.ravel(n)]).reshape(np.shape(n))
        return self._score(self._known.quantiles(_checked(n), [0.5])[0])

    def interval(self, n: Any, level: float = 0.9, fits: int | None = None) -> Any:
        """A band that holds the score with ``n`` training samples with the probability ``level``.

        Args:
            n: Samples; an array gives arrays.
            level: In (0, 1).
            fits: Of the mean of so many fits, whose noise then is in it; None: of the expected score.

        Returns:
            The lower and the upper end.

        Raises:
            NoCurveError: If the curve abstains.
            ValueError: If an argument is out of its domain.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level} must lie between 0 and 1.")
        if fits is not None and fits < 1:
            raise ValueError(f"fits={fits} must be at least 1.")
        if np.ndim(n):
            pairs = np.array([self.interval(one, level, fits) for one in np.ravel(n)])
            return pairs[:, 0].reshape(np.shape(n)), pairs[:, 1].reshape(np.shape(n))
        found = self._known.quantiles(_checked(n), [(1 - level) / 2, (1 + level) / 2], fits)
        low, high = sorted(map(self._score, found))
        return low, high

    def gain(self, start: int, end: int, level: float = 0.9) -> tuple[float, tuple[float, float]]:
        """How much better the expected score gets from ``start`` samples to ``end``: positive where it does.

        Narrower than the difference of two bands, because what is not known of the one is not known of the other.

        Args:
            start: Samples, not fewer than the largest size that was measured.
            end: More than that.
            level: Of the interval.

        Returns:
            Its median, and its interval.

        Raises:
            NoCurveError: If the curve abstains.
            ValueError: If the sizes are none of these.
        """
        known = self._known
        if not known.means.n[-1] <= start < end:
            raise ValueError(f"start={start} must be {int(known.means.n[-1])} or more, and end={end} more than that.")
        low, middle, high = known.gain_quantiles(start, end, [(1 - level) / 2, 0.5, (1 + level) / 2])
        return middle, (low, high)

    def levels_off_at(self, level: float = 0.9) -> tuple[float, tuple[float, float]]:
        """The score that no number of samples exceeds, c in c - a n^-b: its median and its interval."""
        low, middle, high = self._known.quantiles(np.inf, [(1 - level) / 2, 0.5, (1 + level) / 2])
        ends = sorted((self._score(low), self._score(high)))
        return self._score(middle), (ends[0], ends[1])

    def exponent(self, level: float = 0.9) -> tuple[float, tuple[float, float]]:
        """B in c - a n^-b: its median and its interval."""
        known = self._known
        order = np.argsort(known.exponent)
        sums = np.cumsum(known.weight[order])
        found = [known.exponent[order][np.searchsorted(sums, q)] for q in ((1 - level) / 2, 0.5, (1 + level) / 2)]
        return float(found[1]), (float(found[0]), float(found[2]))

    def samples_for(self, score: float, level: float = 0.9) -> SamplesNeeded:
        """How many samples are needed until the expected score is ``score``: where the bands of `interval` meet it.

        Raises:
            NoCurveError: If the curve abstains.
            ValueError: If no score can be that good.
        """
        known = self._known
        best = self.bounds[1] if self.mode == "max" else self.bounds[0]
        if best is not None and (score - best) * (1 if self.mode == "max" else -1) >= 0:
            raise ValueError(f"score={score:g} cannot be reached: no score is better than {best:g}.")
        error = self._error(score)
        start = min(known.means.n[0] / 4, 1e3)
        grid = np.geomspace(start, known.means.n[-1] * HORIZON, 60)
        reached = [known.probability_below(error, n) for n in grid]

        def first(probability: float) -> int | None:
            place = next((i for i, p in enumerate(reached) if p >= probability), None)
            if place is None or place == 0:
                return None if place is None else int(np.ceil(start))
            low, high = np.log(grid[place - 1]), np.log(grid[place])
            for _ in range(12):
                middle = (low + high) / 2
                if known.probability_below(error, float(np.exp(middle))) < probability:
                    low = middle
                else:
                    high = middle
            return int(np.ceil(np.exp(high)))

        off, interval = self.levels_off_at(level)
        fewest, median, most = (first(p) for p in ((1 - level) / 2, 0.5, (1 + level) / 2))
        ever = max(known.probability_below(error, np.inf), reached[-1])
        beyond = int(known.means.n[-1] * HORIZON)
        return SamplesNeeded(float(score), fewest, median, most, level, ever, off, interval, beyond)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a file: what it was fitted to, and c and b with their 90 % intervals."""
        told: dict[str, Any] = {
            "sizes": self.sizes.astype(int).tolist(),
            "mean_scores": self.scores.tolist(),
            "mode": self.mode,
            "abstains": self.reason,
            "notes": list(self.notes),
        }
        if self.reason is None:
            limit, limits = self.levels_off_at()
            exponent, exponents = self.exponent()
            told |= {"c": limit, "c_interval": list(limits), "b": exponent, "b_interval": list(exponents)}
        return told

    # ---- scores are turned into errors, of which less is better

    @property
    def _known(self) -> Posterior:
        if self._posterior is None:
            raise NoCurveError(f"The curve abstains: {self.reason}")
        return self._posterior

    def _error(self, score: float) -> float:
        return -score if self.mode == "max" else score

    def _score(self, error: float) -> float:
        low, high = self.bounds
        score = -error if self.mode == "max" else error
        return float(np.clip(score, -np.inf if low is None else low, np.inf if high is None else high))


def fit_learning_curve(
    sizes: Any,
    scores: Any,
    mode: Literal["max", "min"] = "max",
    bounds: Literal["auto"] | tuple[float | None, float | None] | None = "auto",
) -> LearningCurve:
    """Fits score = c - a n^-b (for ``mode="min"`` c + a n^-b) so that it holds far beyond the largest size.

    A posterior over all such curves, on a grid, with priors on b and c, noise that shrinks with the size, and a drift
    of the power law that grows with the distance from the largest size. No random numbers: equal input, equal output.
    It abstains, with the reason, on curves that no such law describes: see `LearningCurve.reason`.

    Args:
        sizes: (M,) numbers of training samples, one for each score; or (I,) with scores (I, R).
        scores: (M,) scores, of several fits at a size if possible (other subsets, other seeds); or (I, R).
        mode: Whether more is better, or less.
        bounds: Least and greatest possible score, each None where there is none. ``"auto"``: 0 and 1 for scores within
            that with ``mode="max"``, at least 0 for scores of which none is negative with ``mode="min"``, else none.

    Returns:
        The curve.

    Raises:
        ValueError: If sizes and scores do not fit together, are not finite, of one size only, or out of the bounds.

    Example:
        >>> n = [125, 250, 500, 1000, 2000, 4000]
        >>> curve = fit_learning_curve(n, [[0.94 - 0.9 * m**-0.35, 0.941 - 0.9 * m**-0.35] for m in n])
        >>> round(curve.predict(40_000), 2)
        0.92
        >>> curve.samples_for(0.99).is_reachable
        False
    """
    if mode not in ("max", "min"):
        raise ValueError(f'mode={mode!r}: use "max" where more is better, "min" for losses and errors.')
    n, values = _paired(sizes, scores)
    low, high = _bounds(bounds, values, mode)
    if (low is not None and values.min() < low) or (high is not None and values.max() > high):
        raise ValueError(f"There are scores beyond the bounds {low} and {high}: {values.min():g} to {values.max():g}.")
    means = Means.of(n, -values if mode == "max" else values)
    if len(means.n) < 2:
        raise ValueError(f"All scores are of one size, {int(means.n[0]):,}: a curve needs at least {FEWEST} sizes.")
    means, reason, notes = find_fault(means)
    posterior = None
    if reason is None:
        limit = (None if high is None else -high) if mode == "max" else low
        posterior = fit_posterior(means, limit)
    shown = -means.mean if mode == "max" else means.mean
    return LearningCurve(means.n, shown, mode, (low, high), reason, tuple(notes), posterior)


def _paired(sizes: Any, scores: Any) -> tuple[Array, Array]:
    n, values = np.asarray(sizes, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if values.ndim == 2 and n.ndim == 1 and len(n) == len(values):
        n, values = np.repeat(n, values.shape[1]), values.ravel()
    if n.ndim != 1 or n.shape != values.shape or not len(n):
        raise ValueError(
            f"sizes of the shape {n.shape} and scores of the shape {values.shape} do not fit together: give one size"
            " for each score, (M,) and (M,), or (I,) and (I, R)."
        )
    if not np.isfinite(values).all() or not np.isfinite(n).all():
        raise ValueError("Sizes and scores must be finite numbers: leave out fits that failed.")
    if (n <= 0).any():
        raise ValueError("Sizes must be positive.")
    return n, values


def _bounds(given: Any, values: Array, mode: str) -> tuple[float | None, float | None]:
    if given == "auto":
        if mode == "max":
            return (0.0, 1.0) if values.min() >= 0 and values.max() <= 1 else (None, None)
        return (0.0, None) if values.min() >= 0 else (None, None)
    low, high = given if given is not None else (None, None)
    if low is not None and high is not None and low >= high:
        raise ValueError(f"bounds={given}: the first must be below the second.")
    return low, high


def _checked(n: Any) -> float:
    if not float(n) > 0:
        raise ValueError(f"n={n} must be positive.")
    return float(n)


def _pair(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}"
