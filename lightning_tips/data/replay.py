"""Experience replay: which old samples are kept, and how new and old ones are drawn together. Pure functions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_tips.core import as_labels
from lightning_tips.data.mixed_draw import MixedSampler

__all__ = ["choose_memory", "draw_replay", "replay_size"]


def draw_replay(
    new: int, old: int, share: float, seed: int = 0, epoch: int = 0, size: int | None = None
) -> NDArray[np.int64]:
    """The order of an epoch of new samples with old ones among them.

    The old ones are spread evenly, so that any batch has its share of them. Each new sample comes once before any comes
    again, and so does each old one; which old ones come changes with the epoch.

    Args:
        new: How many new samples there are; their indices are ``range(new)``.
        old: How many old ones; their indices follow.
        share: Of the old ones, at least 0 and below 1.
        seed: At least 0.
        epoch: At least 0.
        size: Length of the order; None: each new sample once.

    Returns:
        (size,) indices, a function of the arguments alone.

    Raises:
        ValueError: If an argument is out of its domain.

    Example:
        >>> order = draw_replay(new=6, old=100, share=0.25)
        >>> (order >= 6).astype(int).tolist(), sorted(order[order < 6].tolist())
        ([0, 0, 0, 1, 0, 0, 0, 1], [0, 1, 2, 3, 4, 5])
    """
    if new < 1 or old < 0 or epoch < 0:
        raise ValueError(f"new={new} must be at least 1, old={old} and epoch={epoch} at least 0.")
    sampler = MixedSampler(new, size or replay_size(new, share), 1, seed, num_replicas=1, rank=0)
    if share:
        sampler.set_extra(np.arange(new, new + old), share)
    sampler.set_epoch(epoch)
    return sampler.order()


def replay_size(new: int, share: float) -> int:
    """How long an epoch is in which each new sample comes once and ``share`` of all are old.

    Example:
        >>> replay_size(100, 0.5)
        200
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share} must be at least 0 and below 1: some of each batch has to be new.")
    return int(new / (1 - share) + 1e-9)  # of which floor(size * share) are old: so exactly `new` are new


def choose_memory(labels: Any, size: int, seed: int = 0) -> NDArray[np.int64]:
    """Old samples to keep when not all can be kept: equally many of each class, as far as there are.

    Args:
        labels: (N,) class ids of the old samples.
        size: How many to keep, at least 1.
        seed: Of the choice within a class; a larger size keeps what a smaller one keeps.

    Returns:
        (min(size, N),) indices in ascending order.

    Raises:
        ValueError: If ``size`` is below 1 or samples have several labels.

    Example:
        >>> len(choose_memory([0] * 90 + [1] * 10, 20)), int((choose_memory([0] * 90 + [1] * 10, 20) >= 90).sum())
        (20, 10)
    """
    array = as_labels(labels)
    if size < 1 or array.ndim != 1:
        raise ValueError(f"size={size} must be at least 1, and labels one class id a sample.")
    turn = np.empty(len(array), np.int64)
    for label in np.unique(array):
        members = np.flatnonzero(array == label)
        turn[np.random.default_rng([seed, int(label)]).permutation(members)] = np.arange(len(members))
    return np.sort(np.lexsort((array, turn))[:size])  # the first of each class, then the second of each ...
