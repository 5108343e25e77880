"""Paired differences over seeds: how large, how sure, and what may be said of them.

Pure functions on numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

__all__ = ["Difference", "guess_mode", "holm", "paired_difference", "spread", "verdict"]

Mode = Literal["min", "max"]

_LOWER = "loss|error|err|mse|rmse|mae|mape|nll|bpc|perplexity|ppl|ece|brier|wer|cer|fid|distance"
_HIGHER = (
    "acc|accuracy|f1|fbeta|auc|auroc|ap|map|recall|precision|iou|miou|jaccard|dice|r2|psnr|ssim|kappa|mcc|bleu|rouge"
)


def guess_mode(metric: str) -> Mode | None:
    """Whether a metric is better when lower or higher, if its name says so.

    Example:
        >>> guess_mode("val_loss"), guess_mode("valid/f1"), guess_mode("val_reward")
        ('min', 'max', None)
    """
    words = set(re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", metric).lower()))
    lower, higher = bool(words & set(_LOWER.split("|"))), bool(words & set(_HIGHER.split("|")))
    if lower == higher:
        return None
    return "min" if lower else "max"


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1); NaN where there are too few values."""
    array = np.asarray(values, dtype=float)
    return (
        float(array.mean()) if array.size else math.nan,
        float(array.std(ddof=1)) if array.size > 1 else math.nan,
    )


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences.

    Attributes:
        n: Pairs.
        mean: Of the differences; NaN without pairs.
        sd: Their standard deviation (n - 1); NaN with fewer than two.
        low: Lower end of the confidence interval; NaN with fewer than two pairs.
        high: Upper end.
        p: Two-sided p-value of the t-test that the mean is 0; NaN where there is no interval. 1 if all differences are
            0, and 0 if all are the same other number: then the score is too coarse for its chance to be seen.
        level: Of the interval.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float
    p: float
    level: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def paired_difference(scores: Sequence[float], reference: Sequence[float], level: float = 0.95) -> Difference:
    """The mean difference of pairs with its t interval.

    Args:
        scores: One for each seed.
        reference: Of the same seeds.
        level: Of the interval, in (0, 1).

    Raises:
        ValueError: For lists of different lengths, or a level out of its range.

    Example:
        >>> found = paired_difference([0.92, 0.93, 0.91], [0.90, 0.90, 0.90])
        >>> f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"
        '0.020 [-0.005, 0.045]'
    """
    if len(scores) != len(reference):
        raise ValueError(f"{len(scores)} scores and {len(reference)} of the reference make no pairs.")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1.")
    differences = np.asarray(scores, dtype=float) - np.asarray(reference, dtype=float)
    n = len(differences)
    mean, sd = spread(differences.tolist())
    if n < 2:
        return Difference(n, mean, sd, math.nan, math.nan, math.nan, level)
    error = sd / math.sqrt(n)
    if error < 1e-12 * max(1.0, abs(mean)):  # what is left of equal differences is rounding
        equal = abs(mean) < 1e-12
        return Difference(n, mean, 0.0, mean, mean, 1.0 if equal else 0.0, level)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Difference(n, mean, sd, mean - half, mean + half, p, level)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of p-values for their number; NaN stay, and do not count.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected = [math.nan] * len(p_values)
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for place, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - place)))
        corrected[index] = largest
    return corrected


def verdict(difference: Difference, corrected_p: float, mode: Mode) -> str:
    """What may be said of a difference, in words.

    Args:
        difference: Score of the arm minus that of the reference.
        corrected_p: Its p-value, corrected for the number of arms.
        mode: Whether lower or higher is better.
    """
    if difference.n == 0:
        return "no pair"
    if difference.n == 1:
        return "one seed: no telling"
    if difference.low <= 0 <= difference.high:
        return "no measurable effect"
    which = "better" if (difference.mean > 0) == (mode == "max") else "worse"
    if difference.sd == 0:
        return f"{which}, by the same in each seed"
    if corrected_p >= 1 - difference.level:
        return f"{which}, but uncertain"
    return which
