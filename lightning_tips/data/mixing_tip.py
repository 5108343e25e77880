"""What the tips have in common that mix a second set of samples into the training data of a run."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_tips.core import ActsOn, LoaderTip, require_strategy
from lightning_tips.data.mixed_draw import MixedSampler
from lightning_tips.data.mixed_loader import mixed_loader

__all__ = ["MixingTip"]


class MixingTip(LoaderTip):
    """Stands between the one training loader of a run and the Trainer.

    Args:
        epoch_size: Samples of an epoch over all ranks; None: what :meth:`usual_size` says.
        seed: Of the order.
    """

    tip = "data"
    acts_on = ActsOn.MORE_DATA

    def __init__(self, epoch_size: int | None, seed: int) -> None:
        if epoch_size is not None and epoch_size < 1:
            raise ValueError(f"epoch_size={epoch_size} must be at least 1, or None.")
        self.epoch_size = epoch_size
        self.seed = seed
        self.sampler: MixedSampler | None = None
        """What chooses the training samples, once training has begun."""

    # ---- what a subclass says

    @abstractmethod
    def mixture(self, trainer: pl.Trainer, loader: DataLoader[Any]) -> Any:
        """The dataset of both sets, for the run's loader.

        Raises:
            MisconfigurationException: If they cannot be mixed.
        """

    @abstractmethod
    def mixed(self, loader: DataLoader[Any]) -> None:
        """There is a loader now, with a :attr:`sampler` that draws from the first set only."""

    def usual_size(self, drawn: int) -> int:
        """Samples of an epoch, where the run's loader draws ``drawn``."""
        return drawn

    def begin_epoch(self, trainer: pl.Trainer) -> None:
        """Before the first batch of an epoch is fetched, and of what is left of it after a resume."""
        if self.sampler is not None:  # Lightning's own count is another where steps are counted, not epochs
            self.sampler.set_epoch(trainer.current_epoch)

    # ---- hooks

    def conflict_with(self, other: object) -> str | None:
        """Two of them would replace each other's samples."""
        if isinstance(other, MixingTip):
            return "both mix samples into the training data. Keep one (a mixin brings one, too)."
        return None

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses what cannot work."""
        require_strategy(trainer, self)
        self.sampler = None
        super().prepare(trainer, pl_module)

    def change_loaders(self, trainer: pl.Trainer, loaders: list[DataLoader[Any]]) -> list[DataLoader[Any]]:
        """Mixes the second set into the one that there is."""
        name = type(self).__name__
        if len(loaders) != 1:
            raise MisconfigurationException(f"{name} works with one training loader, not with {len(loaders)}.")
        dataset = self.mixture(trainer, loaders[0])
        size = self.usual_size if self.epoch_size is None else self.epoch_size
        loader = mixed_loader(trainer, loaders[0], dataset, size, self.seed, name, lambda: self.begin_epoch(trainer))
        assert isinstance(loader.sampler, MixedSampler)
        self.sampler = loader.sampler
        self.mixed(loader)
        return [loader]
