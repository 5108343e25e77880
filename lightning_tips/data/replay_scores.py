"""What the module's own validation says of a set of samples, at any moment of a run."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, DistributedSampler

from lightning_tips.core import CaughtLog
from lightning_tips.core.lightning_private import batch_on_device
from lightning_tips.data.untouched import untouched

__all__ = ["validation_loader", "validation_scores"]


def validation_loader(trainer: pl.Trainer, dataset: Any, like: Any) -> DataLoader[Any]:
    """A loader of another validation set, in fixed order and shared out over the ranks.

    Args:
        trainer: The trainer.
        dataset: The set.
        like: The run's own validation loader: its batch size, workers and collate function are used.
    """
    ranks = trainer.distributed_sampler_kwargs
    return DataLoader(
        dataset,
        batch_size=getattr(like, "batch_size", None) or 64,
        sampler=DistributedSampler(dataset, shuffle=False, **ranks) if ranks else None,
        num_workers=getattr(like, "num_workers", 0),
        collate_fn=getattr(like, "collate_fn", None),
    )


def validation_scores(trainer: pl.Trainer, loader: Iterable[Any]) -> dict[str, float]:
    """What ``validation_step`` and the hooks around a validation epoch log for these batches; nothing else sees it.

    A number is averaged over batches and ranks, see :class:`CaughtLog`. All ranks must call; one that has no batch, or
    logs other names than the next, takes part like the others.

    Args:
        trainer: In fit, between two steps.
        loader: Batches as validation gets them; ``limit_val_batches`` holds for them too, a share of them is at
            least one.

    Returns:
        By the names under which the module logs them.

    Raises:
        MisconfigurationException: If no rank logs anything; on all of them.
    """
    module = trainer.lightning_module
    most: int | float | None = trainer.limit_val_batches
    if isinstance(most, float):
        # A share of a small set is still a batch: without one there would be nothing to score.
        most = None if most == 1.0 else max(1, int(len(loader) * most))  # type: ignore[arg-type]
    caught = CaughtLog()
    batches = (batch_on_device(trainer, batch) for batch in islice(loader, most))
    with (
        untouched(trainer, module, log=caught),
        trainer.precision_plugin.val_step_context(),
        caught.validation(module, batches),
    ):
        found = caught.values(trainer, module)
    if not found:
        raise MisconfigurationException(
            f"{type(module).__name__} logs nothing in validation_step, so there are no scores to compare. Log a metric"
            " there, or pass scores=False."
        )
    return found
