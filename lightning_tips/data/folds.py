"""Folds: every sample is held out once, so that a network which has not seen it can judge it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_tips.core import as_labels
from lightning_tips.data.part import PartCallback
from lightning_tips.data.subset import groups_of

__all__ = ["FoldCallback", "stratified_folds"]

Indices = NDArray[np.int64]


def stratified_folds(labels_or_n: Any, folds: int, seed: int = 0) -> Indices:
    """Deals samples into folds, each of which has its share of every class, up to one sample.

    It depends on nothing but its arguments, so all ranks, all fits and a resumed run deal the same.

    Args:
        labels_or_n: (N,) class ids in any form; (N, C) of 0 and 1 where a sample may have several labels, which then
            counts for its rarest one; or the number of samples, for folds without classes.
        folds: How many, at least 2.
        seed: Of the deal, at least 0.

    Returns:
        (N,) the fold of each sample, from 0.

    Raises:
        ValueError: If there are fewer samples than folds, or an argument is out of its domain.
        TypeError: If labels are no class ids.

    Example:
        >>> np.bincount(stratified_folds([0] * 6 + [1] * 3, 3)).tolist()
        [3, 3, 3]
    """
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ValueError(f"folds={folds!r} must be an integer, 2 or more.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed={seed!r} must be an integer, 0 or more.")
    if isinstance(labels_or_n, int | np.integer):
        groups: NDArray[Any] = np.zeros(int(labels_or_n), np.int64)
    else:
        groups = groups_of(as_labels(labels_or_n))
    if len(groups) < folds:
        raise ValueError(f"{len(groups)} samples cannot be dealt into {folds} folds.")
    shuffled = np.random.default_rng([seed, 6]).permutation(len(groups))
    dealt = np.empty(len(groups), np.int64)
    # Class after class, each in random order, dealt in turn: no class and no fold has more than one sample too many.
    dealt[shuffled[np.argsort(groups[shuffled], kind="stable")]] = np.arange(len(groups)) % folds
    return dealt


class FoldCallback(PartCallback):
    """Trains without one fold of the training data, in any run: what would it say of samples that it has not seen?

    ``folds`` runs, one for each ``fold``, hold out every sample once. Each training DataLoader gets a ``Subset`` in
    place of its dataset, as with :class:`SubsetCallback`; validation and test data are left alone.
    :func:`stratified_folds` tells which samples are held out.

    Args:
        fold: The number of the fold that is left out, from 0.
        folds: How many folds there are.
        seed: Of the deal, and of the order of training.
        stratify: Whether each fold has its share of every class (of ten bins, where the targets are floats).
        target_key: Where samples are dicts: the key of the target, if it is none of the usual ones.

    Raises:
        ValueError: If there is no such fold.
        MisconfigurationException: Before the first step, for data that cannot be chosen from.
    """

    def __init__(
        self, fold: int, folds: int, seed: int = 0, stratify: bool = True, target_key: str | None = None
    ) -> None:
        super().__init__(seed, stratify, target_key)
        self.fold = fold
        self.folds = folds
        stratified_folds(max(folds, 1), folds, seed)  # what can be known to be wrong without data
        if isinstance(fold, bool) or not isinstance(fold, int) or not 0 <= fold < folds:
            raise ValueError(f"fold={fold!r} must be a number from 0 to {folds - 1}.")

    def choose(self, groups: Any) -> Indices:
        """All that are in other folds."""
        return np.flatnonzero(stratified_folds(groups, self.folds, self.seed) != self.fold)

    def size_of_part(self, total: int) -> int:
        """About so many; bins of numbers do not depend on it."""
        return total

    def plan(self) -> str:
        """The fold alone."""
        return f"the training samples without fold {self.fold} of {self.folds}"
