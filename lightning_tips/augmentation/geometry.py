"""Moving pixels: flips, turns, shifts and crops of a sample in one map, without interpolation where there is none."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Padding", "exact_maps", "move_pixels", "resample"]

Padding = Literal["zeros", "border", "reflection"]
Array = NDArray[np.float64]


def exact_maps(maps: Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which maps (B, 3, 3) change nothing, and which only flip and shift by whole pixels: each (B,) bool."""
    nothing = (maps == np.eye(3)).all((1, 2))
    straight = (maps[:, 0, 1] == 0) & (maps[:, 1, 0] == 0)
    straight &= (np.abs(maps[:, 0, 0]) == 1) & (np.abs(maps[:, 1, 1]) == 1)
    straight &= (maps[:, :2, 2] == np.floor(maps[:, :2, 2])).all(1)
    return nothing, straight


def move_pixels(images: Tensor, places: Any, maps: Array, result: Tensor, padding: Padding, fill: float) -> None:
    """Flips and shifts samples by copying pixels: what arrives is equal to the bit.

    Args:
        images: (B, C, H, W), any dtype.
        places: (N,) ints, which samples.
        maps: (N, 3, 3) of theirs, straight ones (see :func:`exact_maps`).
        result: Like ``images``; gets the moved samples at ``places``.
        padding: What is beyond the edge.
        fill: Its value, for ``"zeros"``.
    """
    height, width = images.shape[-2:]
    rows = _sources(maps[:, 1, 1], maps[:, 1, 2], height)
    columns = _sources(maps[:, 0, 0], maps[:, 0, 2], width)
    if images.device.type == "cpu" and padding == "zeros" and images.dtype != torch.bfloat16:
        # Strided views in NumPy: a few microseconds each, and a copy is all the work there is.
        source, target = images.numpy(), result.numpy()
        outside = (maps[:, :2, 2] != 0).any(1)
        for n, place in enumerate(places):
            if outside[n]:
                target[place] = fill
            to_rows, from_rows = _overlap(rows[n], height)
            to_columns, from_columns = _overlap(columns[n], width)
            target[place, :, to_rows, to_columns] = source[place, :, from_rows, from_columns]
        return
    device = images.device
    at = torch.as_tensor(np.asarray(places), device=device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=device)[None, :, None, None]
    y, x = torch.from_numpy(rows).to(device)[:, None, :, None], torch.from_numpy(columns).to(device)[:, None, None, :]
    moved = images[at, channel, _inside(y, height, padding), _inside(x, width, padding)]
    if padding == "zeros":
        moved = torch.where((y >= 0) & (y < height) & (x >= 0) & (x < width), moved, fill).to(moved.dtype)
    result[at[:, 0, 0, 0]] = moved


def _sources(factor: Array, offset: Array, side: int) -> NDArray[np.int64]:
    """From which row (or column) each one comes, (N, side); beyond the edge where it is negative or too high."""
    forth = np.arange(side)[None]
    return np.where(factor[:, None] > 0, forth, side - 1 - forth) + offset[:, None].astype(np.int64)


def _overlap(sources: NDArray[np.int64], side: int) -> tuple[slice, slice]:
    """What lies inside: a slice of the result, and the slice of the source that goes there."""
    first, last = int(sources[0]), int(sources[-1])
    low, high = max(min(first, last), 0), min(max(first, last) + 1, side)
    if low >= high:
        return slice(0, 0), slice(0, 0)
    if first <= last:
        return slice(low - first, high - first), slice(low, high)
    return slice(first - high + 1, first - low + 1), slice(high - 1, low - 1 if low else None, -1)


def _inside(index: Tensor, side: int, padding: Padding) -> Tensor:
    if padding != "reflection":
        return index.clamp(0, side - 1)
    index = index.remainder(2 * side)  # as grid_sample: about the outer edge of the outermost pixel
    return torch.where(index < side, index, 2 * side - 1 - index)


def resample(images: Tensor, maps: Array, padding: Padding) -> Tensor:
    """Moves pixels along any affine map, bilinearly, in one pass.

    Args:
        images: (B, C, H, W) float.
        maps: (B, 3, 3) from output to input in pixels from the middle (see ``GeometryOperation.affine``).
        padding: What is beyond the edge; zeros are 0.
    """
    height, width = images.shape[-2:]
    # From pixels to grid_sample's coordinates, in which the image reaches from -1 to 1.
    scale = np.array([width / 2, height / 2, 1.0])
    theta = torch.from_numpy((maps * scale[None, None] / scale[None, :, None])[:, :2]).to(images)
    x = (torch.arange(width, dtype=images.dtype, device=images.device) + 0.5) * (2 / width) - 1
    y = (torch.arange(height, dtype=images.dtype, device=images.device) + 0.5) * (2 / height) - 1
    # An affine map is the sum of one part for the column and one for the row; F.affine_grid costs 30 times as much.
    # In this layout of memory the sum runs along rows of pixels, not along pairs of coordinates.
    across = theta[:, :, 0, None, None] * x
    down = theta[:, :, 1, None, None] * y[:, None] + theta[:, :, 2, None, None]
    grid = torch.empty((len(images), 2, height, width), dtype=images.dtype, device=images.device)
    torch.add(down, across, out=grid)
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode=padding, align_corners=False)
