"""What a network says of samples, from a validation run of the user's own module."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_tips.core import LogitWatcher, as_classes

__all__ = ["LogitRecord"]


class LogitRecord(LogitWatcher):
    """Keeps the logits of every sample of ``Trainer.validate``, in the order in which they came.

    It is for one device and one loader.

    Args:
        target_key: Key of the targets in batches that are dicts, if it is none of the usual ones.
    """

    logits: Tensor | None = None
    """(N, C), after the run."""
    targets: Tensor | None = None
    """(N,), likewise."""

    def watched(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seen: tuple[Tensor, Tensor] | None) -> None:
        """Joins them.

        Raises:
            MisconfigurationException: If no logits were seen, or they are of another form.
        """
        if seen is None:
            raise MisconfigurationException(
                f"Label errors are found by the logits of a network, and none were seen: validation_step of"
                f" {type(pl_module).__name__} does not call self(...), or that returns no tensor."
            )
        self.logits, self.targets = as_classes(*seen, asker="To find label errors one")
