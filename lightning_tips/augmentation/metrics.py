"""Metrics of a training step that is given mixed targets: they count each sample for its larger part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["hard_targets_for", "index_metrics"]


def index_metrics(module: nn.Module) -> list[Metric]:
    """The metrics of torchmetrics within a module that take class indices, or 0 and 1.

    Some refuse probabilities as targets, and some (those of several classes) count nonsense without a word.
    """
    kinds = ("Multiclass", "Multilabel", "Binary")
    return [
        part
        for part in module.modules()
        if isinstance(part, Metric) and any(cls.__name__.startswith(kinds) for cls in type(part).__mro__)
    ]


@contextmanager
def hard_targets_for(metrics: list[Metric]) -> Iterator[None]:
    """While it is open, these metrics take probabilities for what is most probable.

    Args:
        metrics: As of :func:`index_metrics`.
    """
    before = [(metric, metric.update) for metric in metrics]
    for metric, update in before:
        metric.update = partial(_update, metric, update)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for metric, update in before:
            metric.update = update  # type: ignore[method-assign]


def _update(metric: Metric, update: Any, preds: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> None:
    if isinstance(target, Tensor) and target.is_floating_point():
        several = any(cls.__name__.startswith("Multiclass") for cls in type(metric).__mro__)
        target = target.argmax(1) if several and target.ndim > 1 else (target > 0.5).long()
    update(preds, target, *args, **kwargs)
