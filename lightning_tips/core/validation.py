"""A module's own validation, run by a tip at any moment, with what it logs caught."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torchmetrics import Metric

from lightning_tips.core.distributed import gather_objects

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

    def value(self, name: str) -> float:
        """What was logged under one of the names on this rank, of the whole validation."""
        if name in self._metrics:
            return float(self._metrics[name].compute())
        total, weights = self._sums[name]
        return total / weights

    def values(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        """What was logged on any rank, of the whole validation of all of them; all ranks must call.

        A rank may have logged other names than the next, or none: by class, or where it got no batch.

        Args:
            trainer: The one whose ranks are taken together.
            module: The one that logged.

        Raises:
            MisconfigurationException: On every rank, if a metric that only some have is no part of the module.
        """
        paths = {id(part): path for path, part in module.named_modules(remove_duplicate=False)}
        mine = {name: paths.get(id(metric)) for name, metric in self._metrics.items()}
        ranks = gather_objects(trainer, (mine, self._sums))
        places: dict[str, str | None] = {}
        sums: dict[str, tuple[float, float]] = {}
        for metrics, numbers in ranks:
            places = metrics | places
            for name, (total, weights) in numbers.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + total, before[1] + weights)
        for name, path in places.items():
            if path is None and any(name not in metrics for metrics, _ in ranks):
                raise MisconfigurationException(
                    f"{type(module).__name__} logs the metric {name!r} on some ranks only, and it is none of its"
                    " attributes: the other ranks cannot add their part. Let it be one, made in __init__."
                )
        found: dict[str, float] = {}
        # Ranks meet in each compute(), so it is called everywhere, and in one order.
        for name in sorted(places):
            metric: Any = self._metrics[name] if name in self._metrics else module.get_submodule(str(places[name]))
            with warnings.catch_warnings():
                if name not in self._metrics:  # not updated here, as is to be
                    warnings.filterwarnings("ignore", ".*was called before the ``update`` method")
                found[name] = float(metric.compute())
        return found | {name: total / weights for name, (total, weights) in sums.items() if name not in places}

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
