"""The base of tips that choose the training samples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_tips.core.epoch_sampler import OrderedSampler
from lightning_tips.core.lightning_private import forget_train_loaders
from lightning_tips.core.loaders import replace_train_loaders
from lightning_tips.core.tip import TipCallback

__all__ = ["LoaderTip"]


class LoaderTip(TipCallback):
    """Stands between the training loaders of a run and the Trainer, and keeps their samplers in the right epoch.

    Subclasses say in :meth:`change_loaders` what the Trainer gets.
    """

    comes_first: ClassVar[bool] = False
    """Whether it comes before all others that change loaders: for what decides which samples there are."""

    samplers: Sequence[Any] = ()
    """Those of the training loaders that depend on seed, epoch and position alone, once training has begun."""

    @abstractmethod
    def change_loaders(self, trainer: pl.Trainer, loaders: list[DataLoader[Any]]) -> list[DataLoader[Any]]:
        """The loaders to train with in place of those; called each time that the Trainer asks for them.

        Raises:
            MisconfigurationException: For loaders that it cannot work with.
        """

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stands between."""
        super().prepare(trainer, pl_module)
        self.samplers = []
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"overfit_batches repeats the first batches, which leaves {type(self).__name__} nothing to choose."
                " Leave out one of them, or use limit_train_batches."
            )

        def change(loaders: list[DataLoader[Any]]) -> list[DataLoader[Any]]:
            changed = self.change_loaders(trainer, loaders)
            self.samplers = [loader.sampler for loader in changed if isinstance(loader.sampler, OrderedSampler)]
            return changed

        self.on_release(replace_train_loaders(trainer, change, first=self.comes_first))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets loaders be made when it is known where to go on."""
        forget_train_loaders(trainer)

    def start_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the epoch that it is.

        Lightning gives ``set_epoch`` another count, which leaves one out on a resume where steps are counted
        (``max_steps`` without ``max_epochs``).
        """
        for sampler in self.samplers:
            sampler.set_epoch(trainer.current_epoch)
