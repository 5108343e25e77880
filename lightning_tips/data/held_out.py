"""What a network says of samples, from a validation run of the user's own module."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_tips.core import Outputs, as_classes

__all__ = ["LogitRecord"]


class LogitRecord(pl.Callback):
    """Keeps the logits of every sample of ``Trainer.validate``, in the order in which they came.

    Works for every module whose ``forward`` returns logits and whose ``validation_step`` calls it: they are looked at
    as they pass. It is for one device.

    Args:
        target_key: Key of the targets in batches that are dicts, if it is none of the usual ones.
    """

    def __init__(self, target_key: str | None = None) -> None:
        self.target_key = target_key
        self.logits: Tensor | None = None
        """(N, C), after the run."""
        self.targets: Tensor | None = None
        """(N,), likewise."""
        self._outputs = Outputs()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watches what ``forward`` returns."""
        self._outputs.watch(pl_module, tolerant=True)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps logits and targets."""
        self._outputs.keep(batch, self.target_key)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Joins them.

        Raises:
            MisconfigurationException: If no logits were seen, or they are of another form.
        """
        seen = self._outputs.close()
        if seen is None:
            raise MisconfigurationException(
                f"Label errors are found by the logits of a network, and none were seen: validation_step of"
                f" {type(pl_module).__name__} does not call self(...), or that returns no tensor."
            )
        self.logits, self.targets = as_classes(*seen, asker="To find label errors one")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the module alone again."""
        self._outputs.close()
