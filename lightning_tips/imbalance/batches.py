"""Batches with a minimum of each class, in a form that Lightning does not undo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from lightning_tips.imbalance.draw import EpochOrder, epoch_quotas
from lightning_tips.imbalance.sampler import ImbalancedSampler
from lightning_tips.imbalance.strategies import Strategy, raise_to_minimum

__all__ = ["ImbalancedBatchSampler"]


class ImbalancedBatchSampler(ImbalancedSampler):
    """Draws batch after batch, each with at least so many samples of each class.

    Beyond the minimum each class has in every batch its share of the strategy's mix, rounded down or up. Rank ``r`` of
    ``W`` takes the batches ``r, r + W, ...``, so any number of ranks trains on the same batches.

    It goes into a loader as ``sampler=``, with the same ``batch_size``; `loader` does that::

        DataLoader(dataset, batch_size=32, sampler=ImbalancedBatchSampler(labels, batch_size=32))

    Not as ``batch_sampler=``: under a distributed strategy Lightning takes the sampler out of every batch sampler and
    puts its own in, without a word. A ``DistributedSampler``, as this is, it leaves alone.

    Args:
        labels: As for `ImbalancedSampler`.
        batch_size: Samples in a batch of one rank.
        per_class_minimum: Samples of each class in every batch; one number for all or a number for each class, as a
            dict (those it does not name: 0) or a list.
        strategy: As for `ImbalancedSampler`; classes that would fall below the minimum are raised to it.
        num_samples: Samples of an epoch over all ranks, rounded up to whole batches; None: what suits the strategy,
            rounded down for ``"undersample"``.
        seed: As for `ImbalancedSampler`, like all that follow.
        num_replicas: Number of ranks.
        rank: This rank.
        drop_last: Where the batches do not divide by the number of ranks: leave out the last ones, rather than repeat
            the first.
        beta: Of ``"effective"``.
        threshold: Of ``"repeat_factor"``.

    Raises:
        TypeError: If the labels are no class ids.
        ValueError: If an argument is out of its domain, or the minima do not fit into a batch.
    """

    def __init__(
        self,
        labels: Any,
        batch_size: int,
        per_class_minimum: int | dict[int, int] | list[int] = 1,
        strategy: Strategy = "oversample",
        num_samples: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
        beta: float = 0.999,
        threshold: float | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        super().__init__(labels, strategy, num_samples, seed, num_replicas, rank, drop_last, beta, threshold)
        self.batch_size = int(batch_size)
        # An under-sampled epoch that were longer would repeat something.
        shorter = strategy == "undersample" and num_samples is None
        self.batches = max(1, self.epoch_size // self.batch_size if shorter else -(-self.epoch_size // self.batch_size))
        self.epoch_size = self.batches * self.batch_size
        self.per_class_minimum = _minima(per_class_minimum, self._pool.counts, self.mix)
        if (needed := int(self.per_class_minimum.sum())) > self.batch_size:
            raise ValueError(
                f"The minima of all classes need {needed} samples, more than batch_size={self.batch_size}: lower"
                " per_class_minimum or raise batch_size."
            )
        self.mix = raise_to_minimum(self.mix, self.per_class_minimum / self.batch_size)

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        """Samples that one rank draws in an epoch: whole batches, as many on each rank."""
        world = self.num_replicas
        return self.batch_size * (self.batches // world if self.drop_last else -(-self.batches // world))

    def set_position(self, epoch: int, position: int) -> None:
        """As in `ImbalancedSampler`; ``position`` must be at the end of a batch.

        Raises:
            ValueError: If it is not.
        """
        if position % self.batch_size:
            raise ValueError(f"position={position} is in the middle of a batch of {self.batch_size} samples.")
        super().set_position(epoch, position)

    def loader(self, dataset: Any, **arguments: Any) -> DataLoader[Any]:
        """A DataLoader of these batches.

        Args:
            dataset: The dataset that the labels belong to.
            **arguments: Of the DataLoader, such as ``num_workers``.
        """
        return DataLoader(dataset, batch_size=self.batch_size, sampler=self, **arguments)

    def _order_of(self, epoch: int) -> EpochOrder:
        if self._order is None or self._order.epoch != epoch:
            quotas = epoch_quotas(self.mix, self.epoch_size, self.seed, epoch)
            # A chunk is a batch here: its stratification is the guarantee.
            self._order = EpochOrder(self._pool, quotas, self.seed, epoch, self.batches)
        return self._order

    def _parts(self, epoch: int, start: int, stop: int) -> Iterator[NDArray[Any]]:
        order, world = self._order_of(epoch), self.num_replicas
        for mine in range(start // self.batch_size, -(-stop // self.batch_size)):
            begin = mine * self.batch_size
            inside = slice(max(start - begin, 0), min(stop - begin, self.batch_size))
            yield order.draw((self.rank + mine * world) % self.batches, inside)


def _minima(given: int | dict[int, int] | list[int], counts: NDArray[Any], mix: NDArray[Any]) -> NDArray[np.int64]:
    classes = len(counts)
    if isinstance(given, dict):
        if unknown := sorted(set(map(int, given)) - set(range(classes))):
            raise ValueError(f"per_class_minimum names classes {unknown}, but there are only 0 to {classes - 1}.")
        minima = np.zeros(classes, np.int64)
        minima[[int(c) for c in given]] = list(given.values())
    else:
        # One number for all means all that the mix does not leave out.
        minima = np.where(mix > 0, given, 0) if isinstance(given, int) else np.asarray(given)
    if minima.shape != (classes,) or minima.dtype.kind not in "iu" or (minima < 0).any():
        raise ValueError(
            f"per_class_minimum={given} must be an integer of 0 or more, or one for each of {classes} classes."
        )
    if (minima[counts == 0] > 0).any():
        raise ValueError(f"per_class_minimum={given} wants samples of a class that has none.")
    return minima.astype(np.int64)
