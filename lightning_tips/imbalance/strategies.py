"""Which share of an epoch each class gets, and how long the epoch is. Pure functions of the class counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_tips.core.messages import did_you_mean

__all__ = ["STRATEGIES", "Strategy", "check_counts", "default_num_samples", "raise_to_minimum", "target_mix"]

STRATEGIES = ("oversample", "undersample", "sqrt", "effective", "repeat_factor")

Strategy = Literal["oversample", "undersample", "sqrt", "effective", "repeat_factor"] | dict[int, float] | list[float]
"""A name in `STRATEGIES`, or the target mix: a share for each class, as a dict by class id or as a list."""

Array = NDArray[Any]


def check_counts(counts: Array) -> Array:
    """The counts as float64.

    Raises:
        ValueError: If they are not counts, a class has no samples, or there are fewer than two classes.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if counts.ndim != 1 or not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError(f"counts={counts}: give the number of samples of each class, 0 or more, as one row.")
    if len(empty := np.flatnonzero(counts == 0)):
        raise ValueError(
            f"Classes without samples: {_some(empty)} of {len(counts)}. Number the classes from 0 without gaps, or"
            " give the target mix as a dict with 0 for the missing ones."
        )
    if len(counts) < 2:
        raise ValueError("There is one class only, so nothing can be balanced; check the labels.")
    return counts


def target_mix(counts: Array, strategy: Strategy, beta: float = 0.999, threshold: float | None = None) -> Array:
    """The share of each class in an epoch: (C,) float64 with sum 1.

    Args:
        counts: (C,) samples of each class.
        strategy: ``"oversample"`` and ``"undersample"``: all classes alike. ``"sqrt"``: by the root of the counts.
            ``"effective"``: each sample weighs ``(1 - beta) / (1 - beta ** count)`` (Cui et al. 2019, arXiv
            1901.05555). ``"repeat_factor"``: each sample of a class with frequency ``f`` comes
            ``max(1, sqrt(threshold / f))`` times (LVIS, Gupta et al. 2019, arXiv 1908.03195). Or the mix itself: a
            weight for each class, as a dict or a list; the weights need not sum to 1.
        beta: Of ``"effective"``, in [0, 1); 0 leaves the data as they are, towards 1 all classes become alike.
        threshold: Of ``"repeat_factor"``, in (0, 1]: classes rarer than this are repeated. None: ``1 / C``, a class's
            share in balanced data.

    Raises:
        ValueError: If something is out of its domain; the message says what to do.

    Example:
        >>> target_mix([900, 100], "sqrt")
        array([0.75, 0.25])
        >>> target_mix([900, 100], {0: 2, 1: 1}).round(3)
        array([0.667, 0.333])
    """
    if not isinstance(strategy, str):
        return _explicit_mix(counts, strategy)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is none. {did_you_mean(strategy, STRATEGIES)}")
    counts = check_counts(counts)
    if strategy == "sqrt":
        shares = np.sqrt(counts)
    elif strategy == "effective":
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta={beta} must be at least 0 and below 1; 0.999 is usual.")
        shares = counts * (1.0 - beta) / -np.expm1(counts * math.log(beta)) if beta > 0.0 else counts
    elif strategy == "repeat_factor":
        shares = counts * repeat_factors(counts / counts.sum(), threshold)
    else:
        shares = np.ones_like(counts)
    return shares / shares.sum()


def repeat_factors(frequencies: Array, threshold: float | None = None) -> Array:
    """How often a sample of each class comes in an epoch, ``max(1, sqrt(threshold / frequency))`` (LVIS).

    Args:
        frequencies: (C,) share of the samples that show the class; with several labels a sample they sum to more
            than 1.
        threshold: Classes rarer than this are repeated; None: ``1 / C``.
    """
    threshold = 1.0 / len(frequencies) if threshold is None else threshold
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1: a class's share of the samples.")
    return np.maximum(1.0, np.sqrt(threshold / np.asarray(frequencies, dtype=np.float64)))


def default_num_samples(counts: Array, mix: Array, strategy: Strategy) -> int:
    """How many samples an epoch has.

    ``"undersample"``: as many as can be drawn without a repeat, C times the smallest class. A mix given by hand: as
    many as the data have. Otherwise so many that every sample comes at least once: for ``"oversample"`` C times the
    largest class, for ``"repeat_factor"`` the sum of all factors.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if not isinstance(strategy, str):
        return int(counts[mix > 0].sum())
    lengths = counts[mix > 0] / mix[mix > 0]
    return max(1, int(lengths.min() + 1e-6) if strategy == "undersample" else math.ceil(lengths.max() - 1e-6))


def raise_to_minimum(mix: Array, minimum: Array) -> Array:
    """The mix in which no class has less than its minimum; the others give way, each by the same factor.

    Args:
        mix: (C,) with sum 1.
        minimum: (C,) shares, with a sum of at most 1.
    """
    low = np.zeros(len(mix), dtype=bool)
    raised = mix
    while (raised < minimum).any():
        low |= raised < minimum
        others = mix[~low].sum()
        scale = (1.0 - minimum[low].sum()) / others if others > 0 else 0.0
        raised = np.where(low, minimum, mix * scale)
    return raised


def _explicit_mix(counts: Array, strategy: Mapping[int, float] | Sequence[float]) -> Array:
    counts = np.asarray(counts, dtype=np.float64)
    if isinstance(strategy, Mapping):
        given = {_class_id(key): float(value) for key, value in strategy.items()}
        if unknown := sorted(set(given) - set(range(len(counts)))):
            raise ValueError(
                f"The target mix names classes {unknown}, but the labels only have 0 to {len(counts) - 1}: correct it."
            )
        if silent := sorted(set(range(len(counts))) - set(given) - set(np.flatnonzero(counts == 0).tolist())):
            raise ValueError(
                f"The target mix does not say how much of classes {_some(silent)} to draw; give 0 to leave one out."
            )
        shares = np.array([given.get(c, 0.0) for c in range(len(counts))])
    else:
        shares = np.asarray(strategy, dtype=np.float64)
        if shares.shape != counts.shape:
            raise ValueError(
                f"The target mix has the shape {shares.shape}, but there are {len(counts)} classes: give one each."
            )
    if not np.isfinite(shares).all() or (shares < 0).any():
        raise ValueError(f"The target mix {shares.tolist()} must have finite weights of 0 or more.")
    if len(empty := np.flatnonzero((shares > 0) & (counts == 0))):
        raise ValueError(f"The target mix wants classes {_some(empty)}, which have no samples: give 0 for them.")
    if (shares > 0).sum() < 2:
        raise ValueError("The target mix has a weight above 0 for fewer than two classes: nothing could be learnt.")
    return shares / shares.sum()


def _class_id(key: Any) -> int:
    try:
        return int(key)  # json and command lines have strings for keys
    except ValueError:
        raise ValueError(f"The target mix names a class {key!r}, but {key!r} is no class id: use integers.") from None


def _some(classes: Sequence[int] | Array) -> str:
    shown = ", ".join(str(c) for c in classes[:10])
    return shown if len(classes) <= 10 else f"{shown} and {len(classes) - 10} more"
