"""A module's own validation, run by a tip at any moment, with what it logs caught."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

__all__ = ["CaughtLog"]


class CaughtLog:
    """Takes the place of a module's ``log``, so that no logger and no callback sees what is logged.

    A number is averaged over batches, weighted by batch size; a torchmetrics ``Metric`` is computed at the end.
    """

    def __init__(self) -> None:
        self._batch: Any = None
        self._sums: dict[str, tuple[float, float]] = {}
        self._metrics: dict[str, Metric] = {}

    def __call__(self, name: str, value: Any, *_: Any, **options: Any) -> None:
        """What the module calls."""
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        # As Lightning weighs it; in the hook at the end of the epoch there is no batch.
        weight = float(options.get("batch_size") or (1 if self._batch is None else extract_batch_size(self._batch)))
        total, weights = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + weight * float(value), weights + weight)

    @property
    def names(self) -> list[str]:
        """Under which the module logs."""
        return [*self._metrics, *self._sums]

    def value(self, name: str, trainer: pl.Trainer | None = None) -> float:
        """What was logged under one of the names, of the whole validation.

        Args:
            name: One of :attr:`names`.
            trainer: The one whose ranks are taken together, all of which call; None: of this rank alone.
        """
        if name in self._metrics:
            return float(self._metrics[name].compute())
        total, weights = self._sums[name]
        if trainer is None:
            return total / weights
        pair: Tensor = torch.tensor([total, weights], dtype=torch.float32, device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            pair = trainer.strategy.reduce(pair, reduce_op="sum")
        return float(pair[0] / pair[1])

    @contextmanager
    def validation(self, module: pl.LightningModule, batches: Iterable[Any]) -> Iterator[None]:
        """Runs ``validation_step`` and the hooks around a validation epoch of a module that logs here.

        While it is open values can be had; the module's torchmetrics are empty before and afterwards.

        Args:
            module: As it is: in what mode and context it runs is the caller's part.
            batches: As ``validation_step`` takes them.
        """
        takes_number = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
        metrics = [part for part in module.modules() if isinstance(part, Metric)]
        for metric in metrics:
            metric.reset()
        try:
            module.on_validation_epoch_start()
            for number, self._batch in enumerate(batches):
                module.validation_step(self._batch, *((number,) if takes_number else ()))
            self._batch = None
            module.on_validation_epoch_end()
            yield
        finally:
            for metric in metrics:
                metric.reset()
