"""Which learning curves no power law describes: about one in seven (LCDB 1.1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lightning_tips.data.posterior import NOISE_POWERS, Means, noise_of

__all__ = ["FEWEST", "find_fault"]

FEWEST = 4
"""Sizes: the law has three parameters."""
SPAN = 4.0
"""The largest size is so many times the smallest at least."""
RISK = 0.01
"""Of calling a good curve ill-behaved, for each kind of fault."""


def find_fault(means: Means) -> tuple[Means, str | None, list[str]]:
    """Looks for what a power law cannot do.

    Args:
        means: Errors by size.

    Returns:
        The sizes to fit, without small ones where the curve had not begun to fall as it does later; why there can be no
        fit, or None; and notes.
    """
    notes: list[str] = []
    if fault := _too_little(means):
        return means, fault, notes
    if not means.freedom:
        notes.append("one fit a size: the noise is guessed from how the sizes stray")
    noise = _noise(means)
    if fault := _reversal(means, noise) or _no_signal(means, noise):
        return means, fault, notes
    rest = means
    while (by := _acceleration(rest, _noise(rest))) and not _too_little(rest.without_smallest()):
        rest = rest.without_smallest()
        notes.append(f"{int(means.n[len(means.n) - len(rest.n) - 1]):,} samples are left out: before the law begins")
    if by:
        return means, by, []
    return rest, _no_signal(rest, _noise(rest)), notes


def _too_little(means: Means) -> str | None:
    sizes = ", ".join(f"{int(n):,}" for n in means.n)
    if len(means.n) < FEWEST:
        return f"there are {len(means.n)} sizes ({sizes}), and a curve needs {FEWEST} or more"
    if means.n[-1] < SPAN * means.n[0]:
        return f"the sizes ({sizes}) lie too close: the largest must be {SPAN:g} times the smallest or more"
    return None


def _noise(means: Means) -> NDArray[np.float64]:
    """Standard deviation of the mean at each size, by the power of n that explains the spreads best."""

    def log_likelihood(power: float) -> float:
        scale = noise_of(means, power) * (means.n / means.n[-1]) ** -power
        return float(-((means.count - 1) * np.log(scale) + means.squares / (2 * scale**2)).sum())

    power = max(NOISE_POWERS, key=log_likelihood) if means.freedom else 0.0
    return noise_of(means, power) * (means.n / means.n[-1]) ** -power / np.sqrt(means.count)


def _critical(means: Means, tests: int) -> float:
    freedom = means.freedom or max(len(means.n) - 3, 1)
    return float(stats.t.isf(RISK / tests, freedom))


def _reversal(means: Means, noise: NDArray[np.float64]) -> str | None:
    """Worse with more data, beyond noise, and by more than a twentieth of the whole fall."""
    sizes = len(means.n)
    worst, found = 0.0, None
    for i in range(sizes):
        for j in range(i + 1, sizes):
            rise = float(means.mean[j] - means.mean[i])
            sure = _critical(means, sizes * (sizes - 1) // 2) * float(np.hypot(noise[i], noise[j]))
            if rise > max(sure, 0.05 * float(np.ptp(means.mean)), worst):
                worst, found = rise, (i, j)
    if found is None:
        return None
    i, j = found
    later = j < sizes - 1 and means.mean[-1] < means.mean[j]
    return (
        f"it gets worse from {int(means.n[i]):,} to {int(means.n[j]):,} samples, by {worst:.3g}, beyond the noise"
        + (", and better again (double descent?)" if later else "")
        + ". Look at these fits: a rate too high, training cut short, or no early stopping does that"
    )


def _no_signal(means: Means, noise: NDArray[np.float64]) -> str | None:
    """No fall over log n beyond noise."""
    logs = np.log(means.n)
    weight = noise**-2
    centre = (weight * logs).sum() / weight.sum()
    spread = (weight * (logs - centre) ** 2).sum()
    slope = float((weight * (logs - centre) * means.mean).sum() / spread)
    if -slope > _critical(means, 1) * spread**-0.5:
        return None
    stray = float(noise[-1] * np.sqrt(means.count[-1]))
    return (
        f"from {int(means.n[0]):,} to {int(means.n[-1]):,} samples the score does not get better beyond its noise"
        f" (a fit strays by {stray:.2g}). Take sizes further apart or more seeds; if it still does not, more data"
        " brings nothing here"
    )


def _acceleration(means: Means, noise: NDArray[np.float64]) -> str | None:
    """Each doubling brings more than the one before, which a power law never does: on the whole, or at first."""
    logs = np.log(means.n)
    middle = (logs[0] + logs[-1]) / 2
    design = np.stack([np.ones_like(logs), logs - middle, (logs - middle) ** 2], 1) / noise[:, None]
    inverse = np.linalg.inv(design.T @ design)
    _, slope, bend = inverse @ design.T @ (means.mean / noise)
    half = (logs[-1] - logs[0]) / 2
    early, late = -(slope - bend * half), -(slope + bend * half)
    sure = _critical(means, 1)
    if not (bend < -sure * inverse[2, 2] ** 0.5 and late > 1.5 * max(early, 0)):
        first, second = np.diff(logs)[:2]
        early, late = -np.diff(means.mean)[:2] / (first, second)
        weights = np.array([1 / first, -1 / first - 1 / second, 1 / second])
        stray = float(np.sqrt(((weights * noise[:3]) ** 2).sum()))
        if not (late - early > sure * stray and late > 1.5 * max(early, 0)):
            return None
    return (
        f"each doubling still brings more than the one before ({np.log(2) * early:.2g}, then"
        f" {np.log(2) * late:.2g}): the network has not begun to learn as it will. Take larger sizes"
    )
