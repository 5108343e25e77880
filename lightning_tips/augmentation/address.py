"""Where a batch stands in a run: what the random numbers of its samples depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_tips.augmentation.random_numbers import hashed

__all__ = ["UNKNOWN_SIZE", "Address", "batch_size_of", "by_place", "own_numbers"]

UNKNOWN_SIZE = 1 << 20  # more samples than a batch has, where a loader does not tell its batch size


@dataclass(frozen=True)
class Address:
    """The place of a rank's batch in a run.

    Attributes:
        seed: Of the run's augmentation.
        epoch: Counted from 0.
        batch_idx: In the epoch, on this rank.
        batch_size: Of all batches but the last.
        world_size: Number of ranks, which take samples of one order in turns.
        rank: This one.
    """

    seed: int
    epoch: int
    batch_idx: int
    batch_size: int
    world_size: int = 1
    rank: int = 0

    def sample_seeds(self, count: int, numbers: NDArray[np.int64] | None = None) -> Tensor:
        """A seed for each of ``count`` samples of the batch, (count,) int64: by seed, epoch and sample.

        Args:
            count: Samples in the batch.
            numbers: The samples' own numbers (count,); by default their places in the order of all ranks together, so
                that neither the number of ranks nor the batch size can be told from a sample's seed.
        """
        epoch = hashed(hashed(np.array([self.seed]).astype(np.uint64)), self.epoch)
        if numbers is None:
            numbers = (self.batch_idx * self.batch_size + np.arange(count)) * self.world_size + self.rank
        return torch.from_numpy(hashed(epoch, numbers).view(np.int64))

    def batch_seed(self) -> int:
        """A seed for the batch as a whole."""
        word = np.zeros(1, np.uint64)
        for part in (self.seed, self.epoch, self.batch_idx, self.rank):
            word = hashed(word, part)
        return int(word[0])


def batch_size_of(loader: Any) -> int:
    """The size of all batches but the last one, as the loader tells it; else more than any batch has."""
    for owner in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(owner, "batch_size", None)
        if isinstance(size, int) and size > 0:
            return size
    return UNKNOWN_SIZE


def by_place(why: str) -> str:
    """What to tell the user where samples are not known by their place in the dataset, and why."""
    return (
        f"{why}, so its place in the epoch's order decides what becomes of a sample. With another number of ranks or"
        " another order that is another form; sample_key=... makes it depend on the sample."
    )


def own_numbers(batch: Any, key: int | str) -> NDArray[np.int64]:
    """The samples' own numbers (B,) in a batch.

    Raises:
        KeyError: If there is nothing under the key.
        TypeError: If that is no row of integers.
    """
    try:
        numbers = batch[key]
    except (KeyError, IndexError, TypeError) as error:
        raise KeyError(f"The batch has no samples' numbers under sample_key={key!r}.") from error
    if not isinstance(numbers, Tensor) or numbers.ndim != 1 or numbers.is_floating_point():
        raise TypeError(f"The samples' numbers under sample_key={key!r} must be integers (B,).")
    return numbers.cpu().numpy().astype(np.int64)
