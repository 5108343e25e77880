"""What measured scores say of the curve score = c - a n^-b, as weights on a grid of such curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

__all__ = ["Means", "Posterior", "fit_posterior", "noise_of"]

Array = NDArray[np.float64]

# The prior. Exponents of learning curves are mostly 0.1 to 1 (Hestness et al. 2017; Rosenfeld et al. 2020).
EXPONENTS = np.geomspace(0.05, 2.5, 24)
EXPONENT_MEDIAN, EXPONENT_SPREAD = 0.45, 0.7  # of a log-normal
# What is left at any number of samples, as a share of the error at the largest size; its density grows in proportion.
SHARES = (np.arange(30) + 0.5) / 30
# Where the metric has no bound: what is still to come, as a multiple of what the measured sizes brought.
MULTIPLES = np.geomspace(0.01, 30.0, 30)
# By how much the excess over the limit strays from a power law, for each factor e in the size; and how likely.
DRIFTS = np.array([0.01, 0.03, 0.08, 0.2])
DRIFT_WEIGHTS = np.array([0.25, 0.35, 0.3, 0.1])
# Noise shrinks as n^-g.
NOISE_POWERS = np.array([0.0, 0.25, 0.5])
NOISE_FACTORS = np.geomspace(0.5, 2.2, 5)


@dataclass(frozen=True)
class Means:
    """Errors by size, lower is better.

    Attributes:
        n: (I,) sizes in ascending order.
        mean: (I,) mean error.
        count: (I,) fits.
        squares: (I,) sum of squares around the mean.
    """

    n: Array
    mean: Array
    count: Array
    squares: Array

    @staticmethod
    def of(sizes: Array, errors: Array) -> Means:
        """Groups errors by size."""
        n, places, count = np.unique(sizes, return_inverse=True, return_counts=True)
        mean = np.bincount(places, errors) / count
        squares = np.bincount(places, (errors - mean[places]) ** 2)
        return Means(n.astype(np.float64), mean, count.astype(np.float64), squares.astype(np.float64))

    def without_smallest(self) -> Means:
        """All sizes but the smallest."""
        return Means(self.n[1:], self.mean[1:], self.count[1:], self.squares[1:])

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the spread within sizes."""
        return float((self.count - 1).sum())

    @property
    def gain(self) -> float:
        """How much better the largest size is than the smallest."""
        return float(self.mean[0] - self.mean[-1])


def noise_of(means: Means, power: float) -> float:
    """Standard deviation of a fit at the largest size, if it falls as n^-power.

    Where there is one fit a size, from how the means stray from a parabola over log n.
    """
    scale = (means.n / means.n[-1]) ** power
    if means.freedom:
        found = np.sqrt(float((means.squares * scale**2).sum()) / means.freedom)
    else:
        logs = np.log(means.n)
        degree = min(3, len(logs) - 2)
        rest = means.mean - np.polyval(np.polyfit(logs, means.mean, degree), logs)
        found = np.sqrt(float((rest**2).sum()) / (len(logs) - degree - 1))
    # Never nothing: the same score three times happens with few validation samples.
    return float(max(found, 1e-4 * abs(means.gain), 1e-9))


@dataclass(frozen=True)
class Posterior:
    """Curves with weights. K of them: limit + excess (n / n0)^-exponent, the excess a Gaussian.

    Attributes:
        means: What they were fitted to.
        weight: (K,), sums to 1.
        exponent, limit, drift, noise, noise_power: (K,).
        excess, excess_sd: (K,) at the largest size n0.
        start: (K,) excess by which the drift is scaled.
        inverse: (K, I, I) inverse covariance of the means.
        misfit: Weighted mean of the squared residuals over what they should be.
    """

    means: Means
    weight: Array
    exponent: Array
    limit: Array
    drift: Array
    noise: Array
    noise_power: Array
    excess: Array
    excess_sd: Array
    start: Array
    inverse: Array
    misfit: float

    def moments(self, n: float, fits: int | None = None) -> tuple[Array, Array]:
        """Mean and standard deviation (K,) of the error at ``n`` samples.

        Args:
            n: Samples.
            fits: Of the mean of so many fits; None: of the expected error.
        """
        logs = np.log(n / self.means.n[-1])
        seen = np.log(self.means.n / self.means.n[-1])
        x = np.exp(-self.exponent * logs)
        mean = self.limit + self.excess * x
        slope, variance = x, (self.drift * self.start * x) ** 2 * abs(logs)
        if logs < 0:  # between the sizes that were measured, those nearby say more
            xs = np.exp(-self.exponent[:, None] * seen)
            shared = (self.drift * self.start) ** 2 * x
            kernel = shared[:, None] * xs * np.minimum(-seen, -logs)
            solved = np.einsum("ki,kij->kj", kernel, self.inverse)
            rest = self.means.mean - self.limit[:, None] - self.excess[:, None] * xs
            mean = mean + (solved * rest).sum(1)
            slope = x - (solved * xs).sum(1)
            variance = np.maximum(variance - (solved * kernel).sum(1), 0)
        variance = variance + (slope * self.excess_sd) ** 2
        if fits is not None:
            variance = variance + (self.noise * np.exp(-self.noise_power * logs)) ** 2 / fits
        return mean, np.sqrt(variance) + 1e-12

    def probability_below(self, error: float, n: float) -> float:
        """Probability that the expected error at ``n`` samples is at most ``error``; ``n`` may be infinite."""
        if np.isinf(n):
            return float(self.weight[self.limit <= error].sum())
        mean, sd = self.moments(n)
        return float(self.weight @ ndtr((error - mean) / sd))

    def gain_quantiles(self, start: float, end: float, levels: list[float]) -> list[float]:
        """Quantiles of how much less the expected error is at ``end`` samples than at ``start``.

        Args:
            start: Samples, at least as many as the largest size that was measured.
            end: More than that.
            levels: Of the quantiles.
        """
        logs = np.log(np.array([start, end]) / self.means.n[-1])
        x = np.exp(-self.exponent[:, None] * logs)
        change = x[:, 0] - x[:, 1]
        walk = (self.drift * self.start) ** 2 * (change**2 * logs[0] + x[:, 1] ** 2 * (logs[1] - logs[0]))
        sd = np.sqrt((change * self.excess_sd) ** 2 + walk) + 1e-12
        return [_quantile(self.weight, self.excess * change, sd, level) for level in levels]

    def quantiles(self, n: float, levels: list[float], fits: int | None = None) -> list[float]:
        """Quantiles of the error at ``n`` samples; ``n`` may be infinite."""
        if np.isinf(n):
            order = np.argsort(self.limit)
            sums = np.cumsum(self.weight[order])
            places = np.minimum(np.searchsorted(sums, levels), len(order) - 1)
            return [float(value) for value in self.limit[order][places]]
        mean, sd = self.moments(n, fits)
        return [_quantile(self.weight, mean, sd, level) for level in levels]


def _quantile(weight: Array, mean: Array, sd: Array, level: float) -> float:
    """Of a mixture of Gaussians."""
    low, high = float((mean - 8 * sd).min()), float((mean + 8 * sd).max())
    for _ in range(40):
        middle = (low + high) / 2
        if weight @ ndtr((middle - mean) / sd) < level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def fit_posterior(means: Means, lower: float | None) -> Posterior:
    """Weighs curves by how well they explain the errors.

    The error at size n is limit + excess (n / n0)^-b e^d(n), plus noise of standard deviation s (n / n0)^-g for each
    fit. d is a random walk over log n that begins at the largest size n0, in both directions: real curves follow no
    power law exactly, and sizes far from n0 say less of what comes beyond it. The excess at n0 is integrated out, with
    a flat prior on positive values; all else is on a grid.

    Args:
        means: The errors by size.
        lower: The least error there can be; None: there is none that is known.

    Returns:
        The curves with more than e^-9 of the weight of the best one.
    """
    n0, sizes = means.n[-1], len(means.n)
    logs = np.log(means.n / n0)
    best = float(means.mean.min())
    limits = lower + max(best - lower, 0.0) * SHARES if lower is not None else best - max(means.gain, 1e-12) * MULTIPLES
    b, limit = (part.ravel() for part in np.meshgrid(EXPONENTS, limits, indexing="ij"))
    prior = -0.5 * (np.log(b / EXPONENT_MEDIAN) / EXPONENT_SPREAD) ** 2
    if lower is not None:
        prior = prior + np.tile(np.log(SHARES), len(EXPONENTS))
    x = np.exp(-b[:, None] * logs)  # (P, I)
    rest = means.mean - limit[:, None]
    walk = np.minimum(-logs[:, None], -logs[None, :])  # (I, I)
    found: dict[str, list[Any]] = {name: [] for name in Posterior.__dataclass_fields__}
    for power in NOISE_POWERS:
        scale = np.exp(-power * logs)
        precision = means.count / scale**2
        start = (precision * x * rest).sum(1) / (precision * x * x).sum(1)
        start = np.maximum(start, 1e-9 * max(means.gain, 1e-9))
        spread = noise_of(means, power)
        for drift, drift_weight in zip(DRIFTS, DRIFT_WEIGHTS, strict=True):
            strays = (drift * start)[:, None, None] ** 2 * x[:, :, None] * x[:, None, :] * walk
            for factor in NOISE_FACTORS:
                variance = (spread * factor * scale) ** 2
                covariance = strays + np.diag(variance / means.count)
                inverse = np.linalg.inv(covariance)
                weighted = np.einsum("pij,pj->pi", inverse, x)
                information = (weighted * x).sum(1)
                excess = (weighted * rest).sum(1) / information
                squares = np.einsum("pi,pij,pj->p", rest, inverse, rest) - excess**2 * information
                within = -0.5 * ((means.count - 1) * np.log(variance) + means.squares / variance).sum()
                log = (
                    prior
                    + np.log(drift_weight)
                    + within
                    - 0.5 * (np.linalg.slogdet(covariance)[1] + squares + np.log(information))
                    + log_ndtr(excess * np.sqrt(information))
                )
                keep = np.flatnonzero(log > log.max() - 9)
                for name, value in (
                    ("weight", log), ("exponent", b), ("limit", limit), ("excess", excess),
                    ("excess_sd", information**-0.5), ("start", start), ("inverse", inverse), ("misfit", squares),
                ):  # fmt: skip
                    found[name].append(value[keep])
                for name, one in (("drift", drift), ("noise", spread * factor), ("noise_power", power)):
                    found[name].append(np.full(len(keep), one))
    joined = {name: np.concatenate(parts) for name, parts in found.items() if parts}
    log = joined.pop("weight")
    keep = np.flatnonzero(log > log.max() - 9)
    joined = {name: value[keep] for name, value in joined.items()}
    weight = np.exp(log[keep] - log.max())
    weight /= weight.sum()
    misfit = float(weight @ joined.pop("misfit")) / max(sizes - 1, 1)
    # A Gaussian that is cut off at 0.
    return Posterior(means=means, weight=weight, misfit=misfit, **_positive(joined))


def _positive(found: dict[str, Array]) -> dict[str, Array]:
    """Mean and standard deviation of the excess, given that it is positive."""
    mean, sd = found["excess"], found["excess_sd"]
    z = mean / sd
    ratio = np.exp(-0.5 * z**2 - 0.5 * np.log(2 * np.pi) - log_ndtr(z))
    variance = np.maximum(1 - z * ratio - ratio**2, 1e-6)
    return found | {"excess": mean + sd * ratio, "excess_sd": sd * np.sqrt(variance)}
