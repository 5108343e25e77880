"""What the module's own validation says of a set of samples, at any moment of a run."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import Metric

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

    A number is averaged over batches and ranks, weighted by batch size; a torchmetrics ``Metric`` is computed at the
    end. All ranks must call.

    Args:
        trainer: In fit, between two steps.
        loader: Batches as validation gets them; ``limit_val_batches`` holds for them too.

    Returns:
        By the names under which the module logs them.

    Raises:
        MisconfigurationException: If nothing is logged.
    """
    module = trainer.lightning_module
    limit = trainer.limit_val_batches
    most = None if limit == 1.0 else limit if isinstance(limit, int) else int(len(loader) * limit)  # type: ignore[arg-type]
    logged = _Logged()
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    with untouched(trainer, module, log=logged), trainer.precision_plugin.val_step_context():
        for metric in metrics:
            metric.reset()
        takes_number = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
        module.on_validation_epoch_start()
        for number, batch in enumerate(islice(loader, most)):
            batch = batch_on_device(trainer, batch)
            logged.weight = float(extract_batch_size(batch))
            module.validation_step(batch, *((number,) if takes_number else ()))
        logged.weight = 1.0
        module.on_validation_epoch_end()
        found = logged.values(trainer)
        for metric in metrics:
            metric.reset()
    if not found:
        raise MisconfigurationException(
            f"{type(module).__name__} logs nothing in validation_step, so there are no scores to compare. Log a metric"
            " there, or pass scores=False."
        )
    return found


class _Logged:
    """Takes the place of a module's ``log``."""

    def __init__(self) -> None:
        self.weight = 1.0
        self._sums: dict[str, tuple[float, float]] = {}
        self._metrics: dict[str, Metric] = {}

    def __call__(self, name: str, value: Any, *_: Any, **options: Any) -> None:
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        weight = float(options.get("batch_size") or self.weight)
        total, weights = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + weight * float(value), weights + weight)

    def values(self, trainer: pl.Trainer) -> dict[str, float]:
        """Over all ranks."""
        found = {name: float(metric.compute()) for name, metric in self._metrics.items()}
        for name, pair in self._sums.items():
            total: Tensor = torch.tensor(pair, dtype=torch.float32, device=trainer.strategy.root_device)
            if trainer.world_size > 1:
                total = trainer.strategy.reduce(total, reduce_op="sum")
            found[name] = float(total[0] / total[1])
        return found
