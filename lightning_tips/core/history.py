"""The metrics of a run, row by row, and in a form that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

__all__ = ["json_numbers", "note_metrics"]


def note_metrics(rows: list[dict[str, float]], trainer: pl.Trainer, **more: float) -> None:
    """Adds a row of what is logged by epoch to ``rows``, or to the last one where no step came between.

    Args:
        rows: Of the run so far.
        trainer: The trainer, after a validation or at the end of an epoch.
        **more: Other numbers for the row.
    """
    row = {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step)} | more
    row |= {name: float(v) for name, v in trainer.callback_metrics.items() if not name.endswith("_step")}
    if rows and rows[-1]["step"] == row["step"]:
        rows[-1].update(row)
    else:
        rows.append(row)


def json_numbers(value: Any) -> Any:
    """Plain data with null for numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: json_numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [json_numbers(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
