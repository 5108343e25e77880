"""What every operation is: a small frozen record of ranges, which turns uniform numbers into parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["NUMBERS", "Array", "Operation", "Range", "between"]

Array = NDArray[np.float64]
Range = float | tuple[float, float]

NUMBERS = 6
"""Uniform numbers that an operation gets for each sample: one for ``p``, five for parameters."""


@dataclass(frozen=True)
class Operation:
    """One operation of a policy.

    Attributes:
        p: Probability that a sample gets it, in [0, 1].
    """

    p: float = field(default=1.0, kw_only=True)

    rgb_only: ClassVar[bool] = False
    """Whether it needs red, green and blue."""

    def __post_init__(self) -> None:
        self._share("p")

    def drawn(self, numbers: Array) -> NDArray[np.bool_]:
        """Which samples get it: (B,), from uniform numbers (B, NUMBERS)."""
        return numbers[:, 0] < self.p

    def _share(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise ValueError(f"{type(self).__name__}: {name}={value!r} must lie in [0, 1].")

    def _interval(self, name: str, around: float, low: float, high: float) -> None:
        """Makes a pair of the field ``name``: a number is how far to go to both sides of ``around``."""
        value: Any = getattr(self, name)
        try:
            if isinstance(value, int | float):
                pair = (max(around - abs(float(value)), low), around + abs(float(value)))
            else:
                pair = (float(value[0]), float(value[1]))
                if len(value) != 2:
                    raise ValueError
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{type(self).__name__}: {name}={value!r} must be a number or a pair of them.") from error
        if not low <= pair[0] <= pair[1] <= high or not all(map(math.isfinite, pair)):
            raise ValueError(
                f"{type(self).__name__}: {name}={value!r} must lie within {low:g} and {high:g}, the lower end first."
            )
        object.__setattr__(self, name, pair)


def between(numbers: Array, interval: Any) -> Array:
    """Uniform numbers spread over an interval."""
    return interval[0] + numbers * (interval[1] - interval[0])
