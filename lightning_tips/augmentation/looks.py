"""The operations that leave pixels in their places: colours, blur, erasing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_tips.augmentation.operation import Array, Operation, Range, between

__all__ = ["Blur", "Brightness", "ColourOperation", "Contrast", "Erase", "Hue", "Saturation"]


@dataclass(frozen=True)
class ColourOperation(Operation):
    """One that maps each pixel's colour, linearly, by one factor for each sample.

    Attributes:
        amount: 0.2 for factors from 0.8 to 1.2; or the pair of factors itself.
    """

    amount: Range = 0.2
    neutral: ClassVar[float] = 1.0
    """The factor that changes nothing."""
    bounds: ClassVar[tuple[float, float]] = (0.0, math.inf)
    """Of the factors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._interval("amount", self.neutral, *self.bounds)

    @property
    def interval(self) -> tuple[float, float]:
        """The factors' range."""
        return self.amount  # type: ignore[return-value]

    def factors(self, numbers: Array) -> Array:
        """(B,), from uniform numbers (B, NUMBERS)."""
        return np.where(self.drawn(numbers), between(numbers[:, 1], self.interval), self.neutral)


@dataclass(frozen=True)
class Brightness(ColourOperation):
    """Multiplies the image.

    Attributes:
        amount: 0.2 for factors from 0.8 to 1.2; or the pair of factors itself.
    """


@dataclass(frozen=True)
class Contrast(ColourOperation):
    """Stretches colours about the mean grey of the image.

    Attributes:
        amount: 0.2 for factors from 0.8 to 1.2; or the pair of factors itself.
    """


@dataclass(frozen=True)
class Saturation(ColourOperation):
    """Stretches colours about each pixel's grey. RGB only.

    Attributes:
        amount: 0.2 for factors from 0.8 to 1.2; or the pair of factors itself.
    """

    rgb_only: ClassVar[bool] = True


@dataclass(frozen=True)
class Hue(ColourOperation):
    """Turns colours about the axis of greys. RGB only.

    A rotation in RGB, which is linear; torchvision's goes through HSV, which is not. They agree at every third of a
    turn and differ a little between.

    Attributes:
        amount: In turns: 0.05 for 18 degrees to both sides; at most 0.5.
    """

    amount: Range = 0.05
    rgb_only: ClassVar[bool] = True
    neutral: ClassVar[float] = 0.0
    bounds: ClassVar[tuple[float, float]] = (-0.5, 0.5)


@dataclass(frozen=True)
class Blur(Operation):
    """Gaussian blur.

    Attributes:
        sigma: Standard deviation in pixels, drawn from this range; a number means from 0.1 to it.
        size: Taps of the kernel, odd; None: two standard deviations to both sides.
    """

    sigma: Range = (0.1, 1.0)
    size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sigma", (0.1, self.sigma) if isinstance(self.sigma, int | float) else self.sigma)
        self._interval("sigma", 0.0, 0.01, 1000.0)
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1 or self.size % 2 == 0):
            raise ValueError(f"Blur: size={self.size!r} must be an odd number of pixels.")

    @property
    def radius(self) -> int:
        """Taps to each side of the middle."""
        return (self.size - 1) // 2 if self.size is not None else max(1, math.ceil(2 * self.sigma[1]))  # type: ignore[index]

    def kernels(self, numbers: Array) -> Array:
        """One half of each sample's kernel from the middle outwards (B, radius + 1); the whole sums to 1."""
        sigma = between(numbers[:, 1], self.sigma)[:, None]
        half = np.exp(-0.5 * (np.arange(self.radius + 1) / sigma) ** 2)
        return half / (2 * half.sum(1, keepdims=True) - 1.0)


@dataclass(frozen=True)
class Erase(Operation):
    """Fills a rectangle (random erasing, Zhong et al. 2017; cutout).

    Attributes:
        area: Share of the image that is erased.
        ratio: Width to height of the rectangle, in pixels.
        value: What to fill with, in [0, 1]: 0 is the dark end of the images' range, 1 the bright end.
    """

    area: Range = (0.02, 0.2)
    ratio: Range = (0.3, 3.3)
    value: float = 0.0
    p: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "area", (0.02, self.area) if isinstance(self.area, int | float) else self.area)
        self._interval("area", 0.0, 0.0, 1.0)
        self._interval("ratio", 1.0, 0.01, 100.0)
        self._share("value")

    def boxes(self, numbers: Array, height: int, width: int) -> NDArray[np.int64]:
        """Each sample's rectangle as (top, bottom, left, right) pixels (B, 4), the ends excluded."""
        area = between(numbers[:, 1], self.area) * height * width
        ratio = np.exp(between(numbers[:, 2], np.log(self.ratio)))
        tall = np.clip(np.round(np.sqrt(area / ratio)), 1, height)
        wide = np.clip(np.round(np.sqrt(area * ratio)), 1, width)
        top = np.floor(numbers[:, 3] * (height - tall + 1))
        left = np.floor(numbers[:, 4] * (width - wide + 1))
        return np.stack([top, top + tall, left, left + wide], 1).astype(np.int64)
