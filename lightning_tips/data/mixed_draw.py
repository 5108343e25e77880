"""Two sets of samples in one order: each batch holds a given share of the second. A function of (seed, epoch)."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_tips.core import OrderedSampler, SeekableSampler

__all__ = ["MixedSampler", "draw_mixed", "draw_weighted", "natural_share"]

Array = NDArray[Any]

_MAIN, _EXTRA = 11, 12  # purposes of the random numbers


def draw_mixed(size: int, share: float) -> NDArray[np.bool_]:
    """Which places of an order hold a sample of the second set.

    The places are spread evenly: of any ``n`` in a row ``n * share`` are of the second set, rounded down or up. So each
    batch has its share, whatever its size, and the whole order has it too.

    Args:
        size: Length of the order.
        share: Of the second set, from 0 to 1.

    Returns:
        (size,) whether a place is of the second set.

    Raises:
        ValueError: If an argument is out of its domain.

    Example:
        >>> draw_mixed(8, 0.25).astype(int).tolist()
        [0, 0, 0, 1, 0, 0, 0, 1]
    """
    if size < 0 or not 0 <= share <= 1:
        raise ValueError(f"size={size} must be at least 0 and share={share} from 0 to 1.")
    # What is whole but for rounding stays whole.
    steps = np.floor(np.arange(size + 1) * share + 1e-9)
    return np.diff(steps) > 0


def draw_weighted(size: int, weights: ArrayLike | int, seed: int, epoch: int) -> Array:
    """Draws samples in random order, each as often as its weight says, rounded down or up.

    Without weights each comes once before any comes again. Which of the two a weight is rounded to changes with the
    epoch, so that over many epochs each sample gets its share exactly.

    Args:
        size: How many to draw.
        weights: (N,) at least 0 and not all 0; or N, for equal ones.
        seed: At least 0.
        epoch: At least 0.

    Returns:
        (size,) int64 in range(N); a function of the arguments alone.

    Raises:
        ValueError: If there is nothing to draw from.
    """
    if isinstance(weights, int | np.integer):
        if weights < 1 and size:
            raise ValueError("There are no samples to draw from.")
        rounds = -(-size // max(int(weights), 1))
        passes = [np.random.default_rng([seed, epoch, _MAIN, r]).permutation(int(weights)) for r in range(rounds)]
        return np.concatenate([*passes, np.empty(0, np.int64)])[:size].astype(np.int64)
    given = np.asarray(weights, np.float64)
    if given.ndim != 1 or not np.isfinite(given).all() or (given < 0).any() or (size and not given.sum() > 0):
        raise ValueError("weights must be one row of numbers of 0 or more, and not all 0.")
    random = np.random.default_rng([seed, epoch, _EXTRA])
    marks = np.cumsum(given) * (size / given.sum() if size else 0.0)
    if size:
        marks[-1] = size  # a comb of unit steps hits each sample by its weight
    ends = np.floor(marks + random.random()).astype(np.int64)
    counts: NDArray[np.int64] = np.diff(ends, prepend=np.int64(0))
    return random.permutation(np.repeat(np.arange(len(given)), counts))


def natural_share(main: int, extra: int, share: float) -> float:
    """The share of the second set, no more than lets each of its samples come as often as one of the first set.

    Without that limit a handful of samples would fill half of every batch.

    Args:
        main: Samples of the first set.
        extra: Samples of the second.
        share: What is wanted.

    Example:
        >>> natural_share(100, 25, 0.5)
        0.2
    """
    return min(share, extra / max(main + extra, 1))


class MixedSampler(OrderedSampler):
    """Batches of two sets of samples, each with a given share of the second one.

    The order of an epoch depends on (seed, epoch), the share and the second set alone. Rank ``r`` of ``W`` takes the
    batches ``r, r + W, ...`` of it, so that each rank's batches have the share. The order is made when the first index
    is asked for, so the second set may change until then.

    Args:
        main: How many samples the first set has, their indices being ``range(main)``; or a sampler of them, whose order
            over all ranks is kept.
        size: Samples of an epoch over all ranks, of both sets.
        batch_size: Of one rank.
        seed: At least 0, the same on all ranks.
        num_replicas: Number of ranks; None: what torch.distributed says when the sampler is used.
        rank: This rank; None: as above.

    Raises:
        ValueError: If an argument is out of its domain.

    Example:
        >>> sampler = MixedSampler(6, size=8, batch_size=4)
        >>> sampler.set_extra([100, 101], share=0.25)
        >>> [sum(i >= 100 for i in list(sampler)[b : b + 4]) for b in (0, 4)]
        [1, 1]
    """

    def __init__(
        self,
        main: int | SeekableSampler,
        size: int,
        batch_size: int,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(seed, num_replicas, rank)
        if size < 1 or batch_size < 1:
            raise ValueError(f"size={size} and batch_size={batch_size} must be at least 1.")
        self.main, self.batch_size = main, int(batch_size)
        self.epoch_size = int(size)
        self.set_extra([], 0.0)

    def set_extra(self, indices: ArrayLike, share: float, weights: ArrayLike | None = None) -> None:
        """Chooses the second set, for epochs that have not begun.

        Args:
            indices: (M,) what stands for its samples.
            share: Of each batch, from 0 to 1.
            weights: (M,) how often each is drawn, in proportion; None: equally often.

        Raises:
            ValueError: If there is a share but nothing to draw, or not one weight for each.
        """
        extra = np.asarray(indices, np.int64)
        if not 0 <= share <= 1 or (share and not len(extra)):
            raise ValueError(f"share={share} must be from 0 to 1, and 0 where there is nothing to mix in.")
        if weights is not None and np.shape(weights) != extra.shape:
            raise ValueError(f"{np.shape(weights)} weights for {extra.shape} samples.")
        self.extra, self.share = extra, float(share)
        self.weights = None if weights is None else np.asarray(weights, np.float64)

    # ---- the draw

    def indices(self) -> Array:
        """What this rank draws in the epoch that was set: (len(self),) int64."""
        world, batch = self.num_replicas, self.batch_size
        batches = -(-self.num_samples // batch)
        order = self.order(batches * world * batch)
        return order.reshape(batches, world, batch)[:, self.rank].reshape(-1)[: self.num_samples]

    def order(self, size: int | None = None) -> Array:
        """What all ranks draw together in the epoch that was set, batch after batch: (size,) int64."""
        size = self.epoch_size if size is None else size
        is_extra = draw_mixed(size, self.share)
        order = np.empty(size, np.int64)
        order[~is_extra] = self._draw_main(int((~is_extra).sum()))
        if is_extra.any():
            weights = np.ones(len(self.extra)) if self.weights is None else self.weights
            drawn = draw_weighted(int(is_extra.sum()), weights, self.seed, self.epoch)
            order[is_extra] = self.extra[drawn]
        return order

    def _draw_main(self, size: int) -> Array:
        if isinstance(self.main, int | np.integer):
            return draw_weighted(size, int(self.main), self.seed, self.epoch)
        # Its order over all ranks, from one that is alone in the world.
        alone: Any = copy.copy(self.main)
        alone.__class__ = _alone_class(type(alone))  # type: ignore[arg-type]
        alone.set_epoch(self.epoch)
        drawn = np.fromiter(iter(alone), np.int64)
        return np.resize(drawn, size)


@cache
def _alone_class(kind: type) -> type:
    """A sampler's class for a world of one rank, whether it keeps its world or asks for it."""
    one = {"num_replicas": property(lambda _: 1), "rank": property(lambda _: 0)}
    return type(f"Alone{kind.__name__}", (kind,), one)
