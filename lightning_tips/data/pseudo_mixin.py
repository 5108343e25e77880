"""`PseudoLabelMixin`: pseudo-labels brought along by a DataModule."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from lightning_tips.core import TipMixin
from lightning_tips.data.pseudo_callback import PseudoLabelCallback

__all__ = ["PseudoLabelMixin"]


class PseudoLabelMixin(TipMixin):
    """Labels unlabelled samples of a DataModule: brings a :class:`PseudoLabelCallback` to its runs.

    Give it before ``LightningDataModule``, and let the DataModule have a method ``unlabelled_dataset``. For somebody
    else's DataModule, put ``PseudoLabelCallback`` among the Trainer's callbacks instead; it does the same.

    Args:
        *args: For the DataModule.
        unlabelled: As in :class:`PseudoLabelCallback`.
        pseudo_start_epoch: Its ``start_epoch``.
        pseudo_every_n_epochs: Its ``every_n_epochs``.
        pseudo_share: Its ``share``.
        pseudo_threshold: Its ``threshold``.
        pseudo_max_drop: Its ``max_drop``.
        pseudo_monitor: Its ``monitor``.
        pseudo_options: Its other arguments.
        **kwargs: For the DataModule.

    Example:
        >>> from lightning.pytorch import LightningDataModule
        >>> class MyData(PseudoLabelMixin, LightningDataModule):
        ...     '''With a train_dataloader like any other, and unlabelled_dataset().'''
        >>> data = MyData(pseudo_threshold=0.95)
    """

    def __init__(
        self,
        *args: Any,
        unlabelled: Dataset | str = "unlabelled_dataset",
        pseudo_start_epoch: int = 1,
        pseudo_every_n_epochs: int = 1,
        pseudo_share: float = 0.5,
        pseudo_threshold: float = 0.9,
        pseudo_max_drop: float | None = 0.02,
        pseudo_monitor: str = "val_acc",
        pseudo_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.bring(
            PseudoLabelCallback(
                unlabelled,
                pseudo_start_epoch,
                pseudo_every_n_epochs,
                pseudo_share,
                pseudo_threshold,
                max_drop=pseudo_max_drop,
                monitor=pseudo_monitor,
                **(pseudo_options or {}),
            )
        )
