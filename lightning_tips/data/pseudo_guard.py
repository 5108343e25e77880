"""Whether pseudo-labels hurt: a metric beside what supervised training had reached."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["SupervisedGuard"]


class SupervisedGuard:
    """Compares a metric with the best that the run had reached before it used pseudo-labels.

    Args:
        max_drop: How far it may stay below (``mode="max"``) or above it, in units of the metric.
        mode: ``"max"`` or ``"min"``.
        patience: So many values in a row must be further away. A network first has to find its way.
        reference: What supervised training reaches; None: the best value before the first pseudo-labels.

    Example:
        >>> guard = SupervisedGuard(max_drop=0.02, patience=2)
        >>> for value, mixed in [(0.80, False), (0.75, True), (0.79, True), (0.77, True), (0.76, True)]:
        ...     guard.update(value, mixed)
        >>> guard.reference, guard.hurts
        (0.8, True)
    """

    def __init__(
        self, max_drop: float, mode: Literal["min", "max"] = "max", patience: int = 3, reference: float | None = None
    ) -> None:
        if max_drop < 0 or patience < 1 or mode not in ("min", "max"):
            raise ValueError(
                f"max_drop={max_drop} must be 0 or more, patience={patience} at least 1, and mode={mode!r} min or max."
            )
        self.max_drop, self.mode, self.patience, self._given = max_drop, mode, patience, reference
        self.reset()

    def reset(self) -> None:
        """Forgets the last run."""
        self.reference = self._given
        self._last: deque[float] = deque(maxlen=self.patience)

    def update(self, value: float, mixed: bool) -> None:
        """Takes a value of the metric.

        Args:
            value: The metric; one that is not finite is worse than any.
            mixed: Whether the network was trained on pseudo-labels.
        """
        if mixed:
            self._last.append(value)
        elif self._given is None and math.isfinite(value):
            better = max if self.mode == "max" else min
            self.reference = value if self.reference is None else better(self.reference, value)

    @property
    def hurts(self) -> bool:
        """Whether the last ``patience`` values, all with pseudo-labels, are further away than allowed."""
        return len(self._last) == self.patience and all(self._fell(value) for value in self._last)

    @property
    def best(self) -> float:
        """The best of the last ``patience`` values with pseudo-labels."""
        finite = [value for value in self._last if math.isfinite(value)] or [math.nan]
        return max(finite) if self.mode == "max" else min(finite)

    def _fell(self, value: float) -> bool:
        if self.reference is None:
            return False
        drop = self.reference - value if self.mode == "max" else value - self.reference
        # The metric went through float32: a drop of exactly `max_drop` is none.
        return not math.isfinite(value) or drop > self.max_drop + 1e-7 * max(1.0, abs(self.reference))

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"reference": self.reference, "last": list(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.reference = state["reference"]
        self._last = deque(state["last"], maxlen=self.patience)
