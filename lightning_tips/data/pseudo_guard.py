"""Whether pseudo-labels hurt: a metric beside what supervised training reaches."""

from __future__ import annotations

import csv
import math
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, SupportsFloat

import lightning.pytorch as pl

from lightning_tips.core import did_you_mean, on_rank_zero

__all__ = ["SupervisedGuard", "read_curve", "shared_curve"]

Curve = Sequence[tuple[int, float]]


def read_curve(path: str | os.PathLike[str], metric: str) -> list[tuple[int, float]]:
    """The values of a metric over the steps of a run that was there before.

    Args:
        path: A ``metrics.csv`` with the columns ``step`` and ``metric``, as ``CSVLogger`` and ``RunReportCallback``
            write it.
        metric: Name of the metric.

    Returns:
        Pairs of step and value, in the order of the steps; of several values of a step the last one written.

    Raises:
        ValueError: If there is no such file, or no values of that metric in it.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}. CSVLogger and RunReportCallback write a metrics.csv for each run.")
    with Path(path).open(newline="") as file:
        rows = csv.DictReader(file)
        names = list(rows.fieldnames or [])
        if metric not in names or "step" not in names:
            missing = metric if "step" in names else "step"
            raise ValueError(f"{path} has no column {missing!r}. {did_you_mean(missing, names)}")
        values = {int(float(row["step"])): float(row[metric]) for row in rows if row[metric] and row["step"]}
    if not (curve := sorted((step, value) for step, value in values.items() if math.isfinite(value))):
        raise ValueError(f"{path} has no value of {metric!r}.")
    return curve


def shared_curve(trainer: pl.Trainer, path: str | os.PathLike[str], metric: str) -> list[tuple[int, float]]:
    """What :func:`read_curve` says on rank 0, on every rank: the file need not be there on others.

    Raises:
        ValueError: On every rank, as :func:`read_curve` does.
    """
    return on_rank_zero(trainer, lambda: read_curve(path, metric))


class SupervisedGuard:
    """Compares a metric with what supervised training reaches.

    Args:
        max_drop: How far it may stay below (``mode="max"``) or above it, in units of the metric.
        mode: ``"max"`` or ``"min"``.
        patience: So many values in a row must be further away. A network first has to find its way.
        reference: What supervised training reaches: a value; a curve of a supervised run, of which the last value
            until the same step counts (before its first one nothing is compared); None: the best value before the
            first pseudo-labels.

    Example:
        >>> guard = SupervisedGuard(max_drop=0.02, patience=2)
        >>> for value, mixed in [(0.80, False), (0.75, True), (0.79, True), (0.77, True), (0.76, True)]:
        ...     guard.update(value, mixed)
        >>> guard.reference, guard.hurts
        (0.8, True)
    """

    def __init__(
        self,
        max_drop: float,
        mode: Literal["min", "max"] = "max",
        patience: int = 3,
        reference: float | Curve | None = None,
    ) -> None:
        if max_drop < 0 or patience < 1 or mode not in ("min", "max"):
            raise ValueError(
                f"max_drop={max_drop} must be 0 or more, patience={patience} at least 1, and mode={mode!r} min or max."
            )
        self.max_drop, self.mode, self.patience = max_drop, mode, patience
        self._given: float | Curve | None = float(reference) if isinstance(reference, SupportsFloat) else reference
        self.reset()

    def reset(self) -> None:
        """Forgets the last run."""
        self._best: float | None = None  # of what was supervised in this run
        self.reference = self._supervised(0)
        self._last: deque[tuple[float, float]] = deque(maxlen=self.patience)  # with what each is compared

    def follow(self, curve: Curve) -> None:
        """Compares with this supervised run from now on."""
        self._given = curve
        self.reference = self._supervised(0)

    def update(self, value: float, mixed: bool, step: int = 0) -> None:
        """Takes a value of the metric.

        Args:
            value: The metric; one that is not finite is worse than any.
            mixed: Whether the network was trained on pseudo-labels.
            step: Optimizer steps that were made.
        """
        better = max if self.mode == "max" else min
        if not mixed and math.isfinite(value):
            self._best = value if self._best is None else better(self._best, value)
        self.reference = self._supervised(step)
        if mixed and self.reference is not None:
            self._last.append((value, self.reference))

    @property
    def waits(self) -> bool:
        """Whether it needs a value of supervised training first."""
        return self._given is None and self._best is None

    def _supervised(self, step: int) -> float | None:
        if self._given is None or isinstance(self._given, float):
            return self._best if self._given is None else self._given
        before = bisect_right([at for at, _ in self._given], step)
        return self._given[before - 1][1] if before else None

    @property
    def hurts(self) -> bool:
        """Whether the last ``patience`` values, all with pseudo-labels, are further away than allowed."""
        return len(self._last) == self.patience and all(self._fell(*pair) for pair in self._last)

    @property
    def best(self) -> float:
        """The best of the last ``patience`` values with pseudo-labels."""
        finite = [value for value, _ in self._last if math.isfinite(value)] or [math.nan]
        return max(finite) if self.mode == "max" else min(finite)

    def _fell(self, value: float, supervised: float) -> bool:
        drop = supervised - value if self.mode == "max" else value - supervised
        # The metric went through float32: a drop of exactly `max_drop` is none.
        return not math.isfinite(value) or drop > self.max_drop + 1e-7 * max(1.0, abs(supervised))

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"best": self._best, "reference": self.reference, "last": [list(pair) for pair in self._last]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._best, self.reference = state["best"], state["reference"]
        self._last = deque((tuple(pair) for pair in state["last"]), maxlen=self.patience)
