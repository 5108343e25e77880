"""Which samples the running training batch holds, and where it stands in the run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_tips.augmentation.address import UNKNOWN_SIZE, Address, batch_size_of, by_place, own_numbers
from lightning_tips.core import TipCallback, next_indices, record_train_indices, sampler_ranks, say, unknown_indices

__all__ = ["SampleFinder"]


class SampleFinder(TipCallback):
    """A tip that has random numbers for each sample, which depend on the seed, the epoch and the sample.

    Args:
        seed: Of the random numbers.
        sample_key: Where batches hold the samples' own numbers; None: a sample is known by its place in the dataset
            or, where nobody tells that, in the epoch's order.
    """

    def __init__(self, seed: int, sample_key: int | str | None) -> None:
        self.seed = seed
        self.sample_key = sample_key
        self._batch_idx = 0
        self._batch_size = UNKNOWN_SIZE
        self._indices: list[int] | None = None  # of the running batch's samples in the dataset
        self._unknown: str | None = None  # why these cannot be told, or do not tell samples apart
        self._said_place = False

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self._said_place = False

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has the loader tell which samples its batches will hold."""
        super().prepare(trainer, pl_module)
        if self.sample_key is None:
            self.on_release(record_train_indices(trainer))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says so if samples are known by their place in an order that is not the same on any number of ranks."""
        super().on_train_start(trainer, pl_module)
        takes_turns = hasattr(getattr(trainer.train_dataloader, "sampler", None), "set_position")
        if self.sample_key is None and self._unknown and not takes_turns:
            self._say_place(trainer, self._unknown)

    def look_at(self, loader: Any, pl_module: pl.LightningModule, world_size: int = 1) -> None:
        """Learns from the training loader how its samples are known."""
        self._batch_size = batch_size_of(loader)
        self._unknown = unknown_indices(loader, world_size)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes which batch it is: not every training step is told."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.begin_batch(trainer.train_dataloader, batch_idx)

    def begin_batch(self, loader: Any, batch_idx: int) -> None:
        """Notes which batch of the loader comes now, and which samples it holds."""
        indices = next_indices(loader)
        self._batch_idx, self._indices = batch_idx, None if self._unknown else indices

    def release(self) -> None:
        """Leaves the loaders as they were."""
        super().release()
        self._indices = None

    # ---- random numbers

    def _sample_seeds(self, trainer: pl.Trainer, batch: Any, count: int, later: int = 0) -> Tensor:
        """A seed for each of ``count`` samples of the running batch in this epoch, or in one ``later``."""
        return self._address(trainer, later).sample_seeds(count, self._numbers(trainer, batch, count))

    def _address(self, trainer: pl.Trainer, later: int = 0) -> Address:
        """Where the running batch stands, in this epoch or in one ``later``."""
        epoch = trainer.current_epoch + later
        place = sampler_ranks(trainer)
        return Address(self.seed, epoch, self._batch_idx, self._batch_size, place["num_replicas"], place["rank"])

    def _numbers(self, trainer: pl.Trainer, batch: Any, count: int) -> NDArray[np.int64] | None:
        """By what each sample is known; None: by its place in the epoch's order."""
        if self.sample_key is not None:
            return own_numbers(batch, self.sample_key)
        if self._indices is not None and len(self._indices) != count:
            self._say_place(trainer, f"a batch of {len(self._indices)} samples holds {count} images")
            return None
        return None if self._indices is None else np.array(self._indices, np.int64)

    def _say_place(self, trainer: pl.Trainer, why: str) -> None:
        if not self._said_place:
            self._said_place = True
            say(trainer, f"{type(self).__name__}: {by_place(why)}")
