"""A sampler for imbalanced classes whose order depends on (seed, epoch, position) and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_tips.core import OrderedSampler, as_labels, class_counts, find_labels
from lightning_tips.imbalance.draw import EpochOrder, Pool, build_pool, epoch_quotas
from lightning_tips.imbalance.strategies import (
    Strategy,
    check_counts,
    default_num_samples,
    repeat_factors,
    target_mix,
)

__all__ = ["ImbalancedSampler"]

Array = NDArray[Any]


class ImbalancedSampler(OrderedSampler):
    """Draws the samples of each class as often as a strategy says, the same on any number of ranks.

    Each class is drawn its exact share of every epoch, and each sample of a class equally often but for one. Rank
    ``r`` of ``W`` takes the positions ``r, r + W, r + 2W, ...`` of one global order, which no other random draw can
    change. As it is a ``DistributedSampler``, Lightning leaves it alone and calls ``set_epoch``.

    Args:
        labels: Class ids (N,), in any form; 0 and 1 (N, C) where a sample has several labels, which is then drawn by
            its rarest label (a sample without any counts as a class of its own); or a dataset, see `find_labels`.
        strategy: ``"oversample"`` (balanced, every sample at least once), ``"undersample"`` (balanced, no sample
            twice, others in each epoch), ``"sqrt"``, ``"effective"``, ``"repeat_factor"``, or the target mix as a dict
            or a list; see `target_mix`.
        num_samples: Samples of an epoch over all ranks; None: what suits the strategy, see `default_num_samples`.
        seed: At least 0, the same on all ranks.
        num_replicas: Number of ranks; None: what torch.distributed says when the sampler is used.
        rank: This rank; None: as above.
        drop_last: Where the epoch does not divide by the number of ranks: leave out its end, rather than repeat its
            beginning.
        beta: Of ``"effective"``.
        threshold: Of ``"repeat_factor"``.

    Attributes:
        epoch_size: Samples of an epoch over all ranks. (``num_samples`` is what one rank draws, as torch has it.)
        counts: (C,) samples of each class; with several labels a sample, of each label.
        mix: (C,) share of each class in an epoch; with several labels a sample, of each rarest label, and then of
            those without any.

    Raises:
        TypeError: If the labels are no class ids.
        ValueError: If an argument is out of its domain.

    Example:
        >>> sampler = ImbalancedSampler([0] * 6 + [1] * 2)
        >>> len(sampler), sorted(sampler)
        (12, [0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 7, 7])
    """

    def __init__(
        self,
        labels: Any,
        strategy: Strategy = "oversample",
        num_samples: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
        beta: float = 0.999,
        threshold: float | None = None,
    ) -> None:
        super().__init__(seed, num_replicas, rank)
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1, or None for the strategy's own length.")
        self.strategy, self.drop_last = strategy, drop_last
        given = not isinstance(labels, Dataset) and (isinstance(labels, Sequence) or hasattr(labels, "__array__"))
        found = as_labels(labels) if given else find_labels(labels)
        self.counts: Array = class_counts(found)
        self._pool, self.mix = _pool_and_mix(found, self.counts, strategy, beta, threshold)
        self.epoch_size = num_samples or default_num_samples(self._pool.counts, self.mix, strategy)
        self._order: EpochOrder | None = None

    # ---- the draw

    def __iter__(self) -> Iterator[int]:
        for part in self._parts(self.epoch, self._first(), len(self)):
            yield from part.tolist()

    def indices(self, epoch: int | None = None, start: int = 0, stop: int | None = None) -> Array:
        """What this rank draws in an epoch, or in a part of it, as one array.

        Args:
            epoch: The epoch; None: the one that was set.
            start: First position, counted on this rank.
            stop: Position after the last; None: the end of the epoch.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        drawn = np.empty(max(stop - start, 0), self._pool.index.dtype)
        at = 0
        for part in self._parts(self.epoch if epoch is None else epoch, start, stop):
            drawn[at : at + len(part)] = part
            at += len(part)
        return drawn

    def draws_per_class(self) -> Array:
        """How often each class is drawn in an epoch on average: (C,) float64."""
        return self.mix * self.epoch_size

    @cached_property
    def fingerprint(self) -> str:
        """The same where two samplers draw the same."""
        told = (self.seed, self.epoch_size, np.round(self.mix, 12).tolist())
        digest = hashlib.blake2b(repr(told).encode(), digest_size=16)
        digest.update(self._pool.index.data)  # no copy: it may take hundreds of megabytes
        return digest.hexdigest()

    def _order_of(self, epoch: int) -> EpochOrder:
        if self._order is None or self._order.epoch != epoch:
            quotas = epoch_quotas(self.mix, self.epoch_size, self.seed, epoch)
            self._order = EpochOrder(self._pool, quotas, self.seed, epoch)
        return self._order

    def _parts(self, epoch: int, start: int, stop: int) -> Iterator[Array]:
        """What this rank draws at its positions from ``start`` to ``stop``, chunk by chunk."""
        order, world = self._order_of(epoch), self.num_replicas
        at, end = self.rank + start * world, self.rank + stop * world
        while at < end:
            place = at % self.epoch_size  # the end of an epoch that does not divide repeats its beginning
            chunk = order.chunk_of(place)
            first = place - int(order.bounds[chunk])
            last = min(int(order.bounds[chunk + 1]) - int(order.bounds[chunk]), first + end - at)
            part = order.draw(chunk, slice(first, last, world))
            yield part
            at += len(part) * world

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_order": None}  # can be made again

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(strategy={self.strategy!r}, classes={len(self.counts)},"
            f" epoch_size={self.epoch_size}, seed={self.seed})"
        )


def _pool_and_mix(
    labels: Array, counts: Array, strategy: Strategy, beta: float, threshold: float | None
) -> tuple[Pool, Array]:
    if labels.ndim == 1:
        return build_pool(labels, len(counts)), target_mix(counts, strategy, beta, threshold)
    check_counts(counts)
    # The rarest first, so that argmax finds it; those without a label come last.
    order = np.argsort(counts, kind="stable")
    groups = np.where(labels.any(1), order[labels[:, order].argmax(1)], len(counts))
    pool = build_pool(groups, len(counts) + int(groups.max() == len(counts)))
    there = pool.counts > 0  # a label that always has a rarer one beside it is drawn with that one
    mix = np.zeros(len(pool.counts))
    if not isinstance(strategy, str):
        shares = strategy if isinstance(strategy, dict) else dict(enumerate(strategy))
        return pool, target_mix(pool.counts, shares)
    if strategy == "repeat_factor":
        # By how many samples show the label, not by how many have it as their rarest.
        factors = np.append(repeat_factors(counts / len(labels), threshold), 1.0)[: len(mix)]
        mix = pool.counts * factors
        return pool, mix / mix.sum()
    mix[there] = target_mix(pool.counts[there], strategy, beta, threshold)
    return pool, mix
