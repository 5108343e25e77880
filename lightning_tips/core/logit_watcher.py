"""A callback that looks at the logits of validation as they pass."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_tips.core.messages import reason_of
from lightning_tips.core.moments import Outputs

__all__ = ["LogitWatcher"]


class LogitWatcher(pl.Callback):
    """Keeps logits and targets of the first validation loader until the validation has ended.

    Works for every module whose ``forward`` returns logits and whose ``validation_step`` calls it. Subclasses say in
    :meth:`watches` when they look, and take what was seen in :meth:`watched`.

    Args:
        target_key: Key of the targets in batches that are dicts, if it is none of the usual ones.
    """

    tolerant = True
    """Whether outputs that are no tensors are passed by."""

    def __init__(self, target_key: str | None = None) -> None:
        self.target_key = target_key
        self._outputs = Outputs()

    def watches(self, trainer: pl.Trainer) -> bool:
        """Whether to look at the validation that is running."""
        return True

    @abstractmethod
    def watched(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seen: tuple[Tensor, Tensor] | None) -> None:
        """Takes the logits and targets of this rank; ``None`` where there were none."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watches what ``forward`` returns."""
        if self.watches(trainer):
            self._outputs.watch(pl_module, self.tolerant)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps logits and targets.

        Raises:
            MisconfigurationException: If the batch does not tell where its targets are.
        """
        if dataloader_idx > 0:
            return
        try:
            self._outputs.keep(batch, self.target_key)
        except (KeyError, TypeError) as error:
            raise MisconfigurationException(f"{type(self).__name__}: {reason_of(error)}") from error

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives them to :meth:`watched`."""
        if self.watches(trainer):
            self.watched(trainer, pl_module, self._outputs.close())

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the module alone again."""
        self._outputs.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module alone again."""
        self._outputs.close()
