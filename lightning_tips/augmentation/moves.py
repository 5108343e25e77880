"""The operations that move pixels: flips, turns, shifts and crops, each an affine map for each sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lightning_tips.augmentation.operation import Array, Operation, Range, between

__all__ = ["Crop", "GeometryOperation", "HorizontalFlip", "Rotate", "Shift", "VerticalFlip"]


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
        angles = np.deg2rad(between(numbers[:, 0], self.degrees))
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
        number = isinstance(self.by, int | float) and math.isfinite(self.by)
        if not number or self.by < 0 or (self.by >= 1 and self.by != int(self.by)):
            raise ValueError(f"Shift: by={self.by!r} must be whole pixels, or a share of the side below 1.")

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
        area = between(numbers[:, 0], self.area)
        ratio = np.exp(between(numbers[:, 1], np.log(self.ratio)))
        for axis, (side, share) in enumerate(((width, np.sqrt(area * ratio)), (height, np.sqrt(area / ratio)))):
            share = np.minimum(share, 1.0)
            maps[:, axis, axis] = share
            maps[:, axis, 2] = (numbers[:, 2 + axis] - 0.5) * (1 - share) * side
