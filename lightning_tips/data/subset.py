"""Parts of a dataset that lie in each other like Russian dolls, each with its share of every class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_tips.core import as_labels, class_counts

__all__ = ["groups_of", "nested_subset", "subset_size"]

Indices = NDArray[np.int64]


def nested_subset(labels_or_n: Any, size: int | float, seed: int = 0) -> Indices:
    """Chooses samples so that a greater subset of the same seed contains every smaller one.

    Each subset holds every class in proportion to its size, up to a sample or two, and at least once. It depends on
    nothing but its arguments, so all ranks, and a resumed run, choose the same.

    Args:
        labels_or_n: (N,) class ids in any form; (N, C) of 0 and 1 where a sample may have several labels, which then
            counts for its rarest one; or the number of samples, for a choice without classes.
        size: How many: an int, or a float in (0, 1] as a share of all.
        seed: Of the choice, at least 0.

    Returns:
        (size,) places of the chosen samples, in ascending order.

    Raises:
        ValueError: If there are not so many samples, or fewer are wanted than there are classes.
        TypeError: If labels are no class ids; ``bin_targets`` makes some of numbers.

    Example:
        >>> nested_subset([0] * 6 + [1] * 2, 4).tolist()
        [0, 4, 5, 6]
        >>> len(nested_subset(1000, 0.25))
        250
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed={seed!r} must be an integer, 0 or more.")
    if isinstance(labels_or_n, int | np.integer):
        total = int(labels_or_n)
        if total < 1:
            raise ValueError(f"There are {total} samples: nothing to choose from.")
        groups: NDArray[Any] = np.zeros(total, np.int64)
    else:
        groups = groups_of(as_labels(labels_or_n))
        total = len(groups)
    chosen = subset_size(size, total)
    found, places = np.unique(groups, return_inverse=True)
    if chosen < len(found):
        raise ValueError(
            f"A subset of {chosen} samples cannot hold each of {len(found)} classes: take {len(found)} or more, or"
            " choose without classes (stratify=False)."
        )
    keys = np.empty(total)
    rng = np.random.default_rng([seed, 5])
    shuffled = rng.permutation(total)
    by_class = shuffled[np.argsort(places[shuffled], kind="stable")]
    counts = np.bincount(places)
    within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    # The k-th of m samples stands at (k + 1/2) / m of the order, so classes interleave in proportion; the first of
    # each class stands before all others, so that no class is missing.
    keys[by_class] = np.where(within == 0, -1.0, (within + 0.5) / np.repeat(counts, counts))
    # Ties are broken by the shuffled order, not by the order of classes.
    order = shuffled[np.argsort(keys[shuffled], kind="stable")]
    return np.sort(order[:chosen]).astype(np.int64)


def subset_size(size: int | float, total: int) -> int:
    """The number of samples that ``size`` means: itself, or as a float that share of ``total``.

    Raises:
        ValueError: If it is out of its domain.
    """
    if isinstance(size, bool) or not isinstance(size, int | float | np.integer | np.floating):
        raise ValueError(f"size={size!r} must be a number of samples, or a share in (0, 1].")
    if isinstance(size, float | np.floating):
        if not 0 < size <= 1:
            raise ValueError(
                f"size={size} is a float, so a share of the data: it must lie in (0, 1]. For {size:g}"
                " samples write it as an integer."
            )
        return max(1, round(float(size) * total))
    if size < 1:
        raise ValueError(f"size={size} must be at least 1.")
    if size > total:
        raise ValueError(f"size={size}, but there are only {total} training samples.")
    return int(size)


def groups_of(labels: NDArray[Any]) -> NDArray[Any]:
    """One class a sample: where there are several, the rarest; those without any are a class of their own."""
    if labels.ndim == 1:
        return labels
    order = np.argsort(class_counts(labels), kind="stable")
    return np.where(labels.any(1), order[labels[:, order].argmax(1)], labels.shape[1])
