"""The operations: small frozen records of ranges, which turn uniform numbers into parameters for each sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "OPERATIONS",
    "Blur",
    "Brightness",
    "ColourOperation",
    "Contrast",
    "Crop",
    "Erase",
    "GeometryOperation",
    "HorizontalFlip",
    "Hue",
    "Operation",
    "Rotate",
    "Saturation",
    "Shift",
    "VerticalFlip",
]

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
        if not 0.0 <= self.p <= 1.0:
            raise ValueError(f"{type(self).__name__}: p={self.p} must lie in [0, 1].")

    def drawn(self, numbers: Array) -> NDArray[np.bool_]:
        """Which samples get it: (B,), from uniform numbers (B, NUMBERS)."""
        return numbers[:, 0] < self.p

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


def _between(numbers: Array, interval: Any) -> Array:
    return interval[0] + numbers * (interval[1] - interval[0])


class GeometryOperation(Operation):
    """One that moves pixels along an affine map."""

    def affine(self, numbers: Array, height: int, width: int) -> Array:
        """The maps (B, 3, 3) from output to input, in (x, y, 1) pixels from the middle, x to the right, y down.

        Args:
            numbers: Uniform (B, NUMBERS).
            height: Of the images, in pixels.
            width: Likewise.
        """
        maps = np.tile(np.eye(3), (len(numbers), 1, 1))
        chosen = self.drawn(numbers)
        self._fill(maps[:, :2], numbers[:, 1:], height, width)
        maps[~chosen] = np.eye(3)
        return maps

    def _fill(self, maps: Array, numbers: Array, height: int, width: int) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class HorizontalFlip(GeometryOperation):
    """Left becomes right, in a share ``p`` of the samples. Exact."""

    p: float = field(default=0.5, kw_only=True)

    def _fill(self, maps: Array, numbers: Array, height: int, width: int) -> None:
        maps[:, 0, 0] = -1.0


@dataclass(frozen=True)
class VerticalFlip(GeometryOperation):
    """Top becomes bottom, in a share ``p`` of the samples. Exact."""

    p: float = field(default=0.5, kw_only=True)

    def _fill(self, maps: Array, numbers: Array, height: int, width: int) -> None:
        maps[:, 1, 1] = -1.0


@dataclass(frozen=True)
class Rotate(GeometryOperation):
    """Turns about the middle.

    Attributes:
        degrees: Counter-clockwise; a number means both ways up to it.
    """

    degrees: Range = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._interval("degrees", 0.0, -360.0, 360.0)

    def _fill(self, maps: Array, numbers: Array, height: int, width: int) -> None:
        angles = np.deg2rad(_between(numbers[:, 0], self.degrees))
        maps[:, 0, 0] = maps[:, 1, 1] = np.cos(angles)
        maps[:, 1, 0] = np.sin(angles)
        maps[:, 0, 1] = -np.sin(angles)


@dataclass(frozen=True)
class Shift(GeometryOperation):
    """Moves by whole pixels; the same as padding and a crop of the old size. Exact.

    Attributes:
        by: Furthest move along each axis to both sides: an int in pixels, a float below 1 as a share of the side.
    """

    by: int | float = 0.125

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by < 0 or (self.by >= 1 and self.by != int(self.by)):
            raise ValueError(f"Shift: by={self.by} must be whole pixels, or a share of the side below 1.")

    def _fill(self, maps: Array, numbers: Array, height: int, width: int) -> None:
        for axis, side in enumerate((width, height)):
            most = int(self.by) if self.by >= 1 else round(self.by * side)
            maps[:, axis, 2] = np.floor(numbers[:, axis] * (2 * most + 1)) - most


@dataclass(frozen=True)
class Crop(GeometryOperation):
    """Cuts a part out and enlarges it to the old size, as torchvision's RandomResizedCrop.

    Attributes:
        area: Share of the image that is kept.
        ratio: Width to height of the part, relative to that of the image.
    """

    area: Range = (0.5, 1.0)
    ratio: Range = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "area", (self.area, 1.0) if isinstance(self.area, int | float) else self.area)
        self._interval("area", 1.0, 0.01, 1.0)
        self._interval("ratio", 1.0, 0.01, 100.0)

    def _fill(self, maps: Array, numbers: Array, height: int, width: int) -> None:
        area = _between(numbers[:, 0], self.area)
        ratio = np.exp(_between(numbers[:, 1], np.log(self.ratio)))
        for axis, (side, share) in enumerate(((width, np.sqrt(area * ratio)), (height, np.sqrt(area / ratio)))):
            share = np.minimum(share, 1.0)
            maps[:, axis, axis] = share
            maps[:, axis, 2] = (numbers[:, 2 + axis] - 0.5) * (1 - share) * side


class ColourOperation(Operation):
    """One that maps each pixel's colour, linearly, by one factor for each sample."""

    neutral: ClassVar[float] = 1.0
    """The factor that changes nothing."""

    @property
    def interval(self) -> tuple[float, float]:
        """The factors' range."""
        return self.amount  # type: ignore[attr-defined]

    def factors(self, numbers: Array) -> Array:
        """(B,), from uniform numbers (B, NUMBERS)."""
        return np.where(self.drawn(numbers), _between(numbers[:, 1], self.interval), self.neutral)


@dataclass(frozen=True)
class Brightness(ColourOperation):
    """Multiplies the image.

    Attributes:
        amount: 0.2 for factors from 0.8 to 1.2; or the pair of factors itself.
    """

    amount: Range = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._interval("amount", 1.0, 0.0, math.inf)


@dataclass(frozen=True)
class Contrast(ColourOperation):
    """Stretches colours about the mean grey of the image.

    Attributes:
        amount: 0.2 for factors from 0.8 to 1.2; or the pair of factors itself.
    """

    amount: Range = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._interval("amount", 1.0, 0.0, math.inf)


@dataclass(frozen=True)
class Saturation(ColourOperation):
    """Stretches colours about each pixel's grey. RGB only.

    Attributes:
        amount: 0.2 for factors from 0.8 to 1.2; or the pair of factors itself.
    """

    amount: Range = 0.2
    rgb_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._interval("amount", 1.0, 0.0, math.inf)


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

    def __post_init__(self) -> None:
        super().__post_init__()
        self._interval("amount", 0.0, -0.5, 0.5)


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
        if self.size is not None and (self.size < 1 or self.size % 2 == 0):
            raise ValueError(f"Blur: size={self.size} must be an odd number of pixels.")

    @property
    def radius(self) -> int:
        """Taps to each side of the middle."""
        return (self.size - 1) // 2 if self.size is not None else max(1, math.ceil(2 * self.sigma[1]))  # type: ignore[index]

    def kernels(self, numbers: Array) -> Array:
        """One half of each sample's kernel from the middle outwards (B, radius + 1); the whole sums to 1."""
        sigma = _between(numbers[:, 1], self.sigma)[:, None]
        half = np.exp(-0.5 * (np.arange(self.radius + 1) / sigma) ** 2)
        return half / (2 * half.sum(1, keepdims=True) - 1.0)


@dataclass(frozen=True)
class Erase(Operation):
    """Fills a rectangle (random erasing, Zhong et al. 2017; cutout).

    Attributes:
        area: Share of the image that is erased.
        ratio: Width to height of the rectangle, in pixels.
        value: What to fill with: 0 is the dark end of the images' range, 1 the bright end.
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
        if not 0 <= self.value <= 1:
            raise ValueError(f"Erase: value={self.value} must lie in [0, 1], from dark to bright.")

    def boxes(self, numbers: Array, height: int, width: int) -> NDArray[np.int64]:
        """Each sample's rectangle as (top, bottom, left, right) pixels (B, 4), the ends excluded."""
        area = _between(numbers[:, 1], self.area) * height * width
        ratio = np.exp(_between(numbers[:, 2], np.log(self.ratio)))
        tall = np.clip(np.round(np.sqrt(area / ratio)), 1, height)
        wide = np.clip(np.round(np.sqrt(area * ratio)), 1, width)
        top = np.floor(numbers[:, 3] * (height - tall + 1))
        left = np.floor(numbers[:, 4] * (width - wide + 1))
        return np.stack([top, top + tall, left, left + wide], 1).astype(np.int64)


OPERATIONS: dict[str, type[Operation]] = {
    cls.__name__: cls
    for cls in (HorizontalFlip, VerticalFlip, Rotate, Shift, Crop, Brightness, Contrast, Saturation, Hue, Blur, Erase)
}
"""What a policy can name."""
