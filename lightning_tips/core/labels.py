"""Labels as arrays: class ids, several labels a sample, bins of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["as_labels", "as_values", "bin_targets", "class_counts"]

Array = NDArray[Any]

_MOST_CLASSES = 10_000_000  # beyond this it is no class id but something else: a hash, a time, a measurement


def as_labels(labels: Any) -> Array:
    """Labels in any form as an array of integers; without a copy where they are one already.

    Args:
        labels: A sequence, array or tensor of integers or bools, (N,) or (N, 1); or (N, C) of 0 and 1, where a sample
            may have several labels. Floats are taken if all are 0 or 1, as a binary loss wants them.

    Raises:
        TypeError: If they are no class ids.
        ValueError: If they are of another shape, negative, or none.
    """
    if isinstance(labels, torch.Tensor):
        labels = labels.detach().cpu()
        array = labels.float().numpy() if labels.dtype in (torch.bfloat16, torch.float16) else labels.numpy()
    else:
        try:
            array = np.asarray(labels)
        except ValueError as error:
            raise ValueError(f"The labels are ragged: give (N,) class ids, or (N, C) of 0 and 1. {error}") from None
    if not array.size:
        raise ValueError("There are no labels: the dataset is empty.")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim not in (1, 2):
        raise ValueError(f"Labels of the shape {array.shape}: one class id a sample, (N,), or (N, C) of 0 and 1.")
    if array.dtype.kind in "USO":
        raise TypeError(
            f"Labels of type {type(labels[0]).__name__} such as {labels[0]!r} are no class ids; number them:"
            " np.unique(labels, return_inverse=True)[1]."
        )
    if array.dtype.kind == "f":
        if not ((array == 0) | (array == 1)).all():
            raise TypeError(
                "The labels are floats. For regression, sample by bins of them: labels=bin_targets(values, bins=10);"
                " for classes convert them to integers."
            )
        array = array.astype(np.uint8)
    if array.dtype.kind == "b":
        array = array.view(np.uint8)
    if array.dtype.kind not in "iu":
        raise TypeError(f"Labels of dtype {array.dtype} are no class ids; give integers.")
    if (lowest := int(array.min())) < 0:
        raise ValueError(
            f"There are negative class ids, {lowest} for one: classes are numbered from 0. If that marks samples to"
            " ignore, leave them out with a Subset."
        )
    if array.ndim == 2 and int(array.max()) > 1:
        raise ValueError(
            f"Labels of the shape {array.shape} must be 0 or 1, whether the sample has the label; found {array.max()}."
        )
    return array


def class_counts(labels: Any) -> NDArray[np.int64]:
    """How many samples each class has: (C,), where C is the highest class id plus one.

    Example:
        >>> class_counts([0, 0, 1, 0])
        array([3, 1])
    """
    array = as_labels(labels)
    if array.ndim == 2:
        return array.sum(0, dtype=np.int64)
    if (highest := int(array.max())) >= _MOST_CLASSES:
        raise ValueError(f"The class id {highest} is too high: number the classes from 0 without gaps.")
    counts = np.zeros(highest + 1, np.int64)
    for at in range(0, len(array), 1 << 20):  # bincount makes a copy of 8 bytes a label
        counts += np.bincount(array[at : at + (1 << 20)].astype(np.int64), minlength=len(counts))
    return counts


def bin_targets(values: Any, bins: int | Sequence[float] = 10, method: str = "quantile") -> NDArray[np.int64]:
    """Classes for regression targets: the number of the bin that each value lies in.

    Bins of equal width are what there is to balance: their counts differ. Quantiles are balanced already, but for ties
    and with an explicit mix. Bins without a value are left out, so that the ids have no gaps.

    Args:
        values: (N,) or (N, 1) finite numbers.
        bins: How many bins, at least 2; or the inner edges, in ascending order.
        method: ``"quantile"`` or ``"width"``, where ``bins`` is a number.

    Raises:
        ValueError: If an argument is out of its domain or all values fall into one bin.

    Example:
        >>> bin_targets([0.1, 0.2, 0.3, 9.0], bins=2, method="width")
        array([0, 0, 0, 1])
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"values of the shape {array.shape} must be one row of finite numbers, and at least one.")
    if method not in ("quantile", "width"):
        raise ValueError(f'method={method!r}: use "quantile" or "width".')
    if isinstance(bins, int):
        if bins < 2:
            raise ValueError(f"bins={bins} must be at least 2.")
        inner = np.linspace(0.0, 1.0, bins + 1)[1:-1]
        low, high = array.min(), array.max()
        edges = np.quantile(array, inner) if method == "quantile" else low + (high - low) * inner
    else:
        edges = np.asarray(bins, dtype=np.float64)
        if edges.ndim != 1 or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
            raise ValueError(f"bins={bins} must be a number or edges in ascending order.")
    found, classes = np.unique(np.searchsorted(edges, array, side="right"), return_inverse=True)
    if len(found) < 2:
        raise ValueError("All values fall into one bin: give other bins.")
    return classes.astype(np.int64)


def as_values(targets: Any) -> Array:
    """Targets in any form as an array of floats, for regression."""
    if isinstance(targets, torch.Tensor):
        targets = targets.detach().cpu().double()
    return np.asarray(targets, np.float64)
