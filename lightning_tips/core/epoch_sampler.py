"""An order of samples that depends on the seed, the epoch and the position alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.distributed
from torch.utils.data import DistributedSampler

__all__ = ["EpochSampler"]


class EpochSampler(DistributedSampler[Any]):
    """Each sample once an epoch, in an order that can be taken up anywhere after a resume.

    Rank ``r`` of ``W`` takes the positions ``r, r + W, ...`` of one order, whose beginning is repeated at its end where
    it does not divide. As it is a ``DistributedSampler``, Lightning leaves it alone and calls ``set_epoch``.

    Args:
        samples: How many there are.
        seed: The same on all ranks.
        shuffle: Whether each epoch has an order of its own; else it is that of the dataset.
        num_replicas: Number of ranks; None: what torch.distributed says when the sampler is used.
        rank: This rank; None: as above.
    """

    def __init__(
        self,
        samples: int,
        seed: int = 0,
        shuffle: bool = True,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        # DistributedSampler's own __init__ wants a dataset, and the process group before there is one.
        self.samples, self.seed, self.shuffle, self.drop_last = samples, seed, shuffle, False
        self._num_replicas, self._rank = num_replicas, rank
        self.epoch = 0
        self._start: tuple[int, int] | None = None

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """The number of ranks."""
        return self._num_replicas if self._num_replicas is not None else _world()[0]

    @property
    def rank(self) -> int:  # type: ignore[override]
        """This rank."""
        return self._rank if self._rank is not None else _world()[1]

    def __len__(self) -> int:
        return -(-self.samples // self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration draws."""
        self.epoch = int(epoch)

    def set_position(self, epoch: int, position: int) -> None:
        """Lets the next iteration of ``epoch`` begin after ``position`` of its samples, to go on after a checkpoint."""
        self.set_epoch(epoch)
        self._start = (int(epoch), int(position))

    def __iter__(self) -> Iterator[int]:
        start, self._start = self._start, None
        order = np.arange(self.samples)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch, 4]).permutation(self.samples)
        world = self.num_replicas
        mine = np.resize(order, len(self) * world)[self.rank :: world]
        return iter(mine[start[1] if start and start[0] == self.epoch else 0 :].tolist())


def _world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
