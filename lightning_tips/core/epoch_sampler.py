"""Orders of samples that depend on the seed, the epoch and the position alone, the same on any number of ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.distributed
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

__all__ = ["EpochSampler", "OrderedSampler"]


class OrderedSampler(DistributedSampler[Any]):
    """One order for all ranks, of which each draws its own part, and which can be taken up anywhere after a resume.

    It keeps what such a sampler needs to know: ranks, epoch and position (`SeekableSampler`). As it is a
    ``DistributedSampler``, Lightning leaves it alone and calls ``set_epoch``. Subclasses set :attr:`epoch_size` and say
    what a rank draws, in :meth:`indices`.

    Args:
        seed: At least 0, the same on all ranks.
        num_replicas: Number of ranks; None: what torch.distributed says when the sampler is used.
        rank: This rank; None: as above.

    Raises:
        ValueError: If an argument is out of its domain.
    """

    epoch_size: int
    """Samples of an epoch over all ranks. (``num_samples`` is what one rank draws, as torch has it.)"""

    def __init__(self, seed: int = 0, num_replicas: int | None = None, rank: int | None = None) -> None:
        # DistributedSampler's own __init__ wants a dataset, and the process group before a DataModule can have it.
        if isinstance(seed, bool) or not 0 <= seed < 1 << 63:
            raise ValueError(f"seed={seed} must be 0 or more.")
        for name, value in (("num_replicas", num_replicas), ("rank", rank)):
            if value is not None and value < (name == "num_replicas"):
                raise ValueError(f"{name}={value} is too low.")
        if num_replicas is not None and rank is not None and rank >= num_replicas:
            raise ValueError(f"rank={rank} must be below num_replicas={num_replicas}.")
        self._num_replicas, self._rank = num_replicas, rank
        self.seed, self.shuffle, self.drop_last = int(seed), True, False
        self.epoch = 0
        self._start: tuple[int, int] | None = None

    # ---- ranks

    @property
    def num_replicas(self) -> int:
        """The number of ranks."""
        return self._num_replicas if self._num_replicas is not None else _world()[0]

    @num_replicas.setter
    def num_replicas(self, value: int | None) -> None:
        self._num_replicas = value

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank if self._rank is not None else _world()[1]

    @rank.setter
    def rank(self, value: int | None) -> None:
        self._rank = value

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        """Samples that one rank draws in an epoch, the same number on each."""
        world = self.num_replicas
        return self.epoch_size // world if self.drop_last else -(-self.epoch_size // world)

    @property
    def total_size(self) -> int:  # type: ignore[override]
        """Samples that all ranks draw in an epoch."""
        return self.num_samples * self.num_replicas

    def __len__(self) -> int:
        return self.num_samples

    # ---- where to begin

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration draws."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch} must be 0 or more.")
        self.epoch = int(epoch)

    def set_position(self, epoch: int, position: int) -> None:
        """Lets the next iteration of ``epoch`` begin in its middle, to go on after a checkpoint.

        Also chooses the epoch. The position is forgotten when the first index of the next iteration has been asked
        for, whichever epoch that one draws. The length stays that of a whole epoch.

        Args:
            epoch: The epoch.
            position: How many samples of it this rank has had; at most ``len(self)``.

        Raises:
            ValueError: If there is no such place.
        """
        if not 0 <= position <= len(self):
            raise ValueError(f"position={position} must lie in an epoch of {len(self)} samples a rank.")
        self.set_epoch(epoch)
        self._start = (int(epoch), int(position))

    def _first(self) -> int:
        """Where the iteration that begins now is to begin."""
        start, self._start = self._start, None
        return start[1] if start and start[0] == self.epoch else 0

    # ---- the draw

    @abstractmethod
    def indices(self) -> NDArray[Any]:
        """What this rank draws in the epoch that was set: (len(self),)."""

    def __iter__(self) -> Iterator[int]:
        first = self._first()
        yield from self.indices()[first:].tolist()


class EpochSampler(OrderedSampler):
    """Each sample once an epoch.

    Rank ``r`` of ``W`` takes the positions ``r, r + W, ...`` of one order, whose beginning is repeated at its end where
    it does not divide.

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
        super().__init__(seed, num_replicas, rank)
        self.epoch_size, self.shuffle = samples, shuffle

    def indices(self) -> NDArray[Any]:
        """What this rank draws in the epoch that was set: (len(self),)."""
        world = self.num_replicas
        return np.resize(self.order(), len(self) * world)[self.rank :: world]

    def order(self) -> NDArray[Any]:
        """What all ranks draw together in the epoch that was set: (epoch_size,)."""
        if not self.shuffle:
            return np.arange(self.epoch_size)
        return np.random.default_rng([self.seed, self.epoch, 4]).permutation(self.epoch_size)


def _world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
