"""Colours and blur: one linear map of colours for each sample, one separable kernel for each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_tips.augmentation.operations import Brightness, ColourOperation, Contrast, Hue, Saturation

__all__ = ["blur", "change_colours"]

GREY = (0.2989, 0.587, 0.114)  # as torchvision: ITU-R 601

Array = NDArray[np.float64]


def change_colours(
    images: Tensor, operations: Sequence[ColourOperation], factors: Sequence[Array], top: float
) -> Tensor:
    """Applies colour operations in their order, as one matrix and one offset for each sample.

    In between nothing is cut off at the ends of the range, only at the end: what one operation drives out of it
    another can bring back. On other images than RGB only brightness and contrast are possible, with the mean of all
    channels as the grey.

    Args:
        images: (B, C, H, W) float32 from 0 to ``top``; overwritten.
        operations: In their order.
        factors: For each operation (B,).
        top: The bright end of the range.

    Returns:
        (B, C, H, W) from 0 to ``top``.
    """
    batch, channels = images.shape[:2]
    rgb = channels == 3
    grey = np.array(GREY if rgb else [1 / channels] * channels)
    crossed = any(
        isinstance(op, Saturation | Hue) and (f != op.neutral).any() for op, f in zip(operations, factors, strict=True)
    )
    matrix = np.tile(np.eye(channels), (batch, 1, 1)) if crossed else np.ones((batch, channels, 1))
    offset = np.zeros((batch, channels))
    means: Array | None = None
    for operation, factor in zip(operations, factors, strict=True):
        if (factor == operation.neutral).all():
            continue
        part = factor[:, None, None]
        if isinstance(operation, Brightness):
            matrix, offset = part * matrix, factor[:, None] * offset
        elif isinstance(operation, Contrast):
            if means is None:  # of the images as they come; what earlier operations make of it is linear
                means = images.mean((2, 3)).double().cpu().numpy()
            now = (matrix @ means[:, :, None])[:, :, 0] if crossed else matrix[:, :, 0] * means
            middle = (now + offset) @ grey
            matrix = part * matrix
            offset = factor[:, None] * offset + ((1 - factor) * middle)[:, None]
        elif isinstance(operation, Saturation):
            mixing = part * np.eye(3) + (1 - part) * grey[None, None]
            matrix, offset = mixing @ matrix, (mixing @ offset[:, :, None])[:, :, 0]
        elif isinstance(operation, Hue):
            turn = _about_grey(factor)
            matrix, offset = turn @ matrix, (turn @ offset[:, :, None])[:, :, 0]
        else:
            raise TypeError(f"{type(operation).__name__} is no known colour operation.")
    scale, shift = (torch.from_numpy(part).to(images) for part in (matrix, offset))
    if crossed:
        flat = images.flatten(2)
        images = torch.baddbmm(shift[:, :, None], scale, flat).view_as(images)
    else:
        images = images.mul_(scale[..., None]).add_(shift[:, :, None, None])
    return images.clamp_(0.0, top)


def _about_grey(turns: Array) -> Array:
    """Rotations (B, 3, 3) about the axis (1, 1, 1), from red towards green towards blue."""
    angles = 2 * math.pi * turns[:, None, None]
    cross = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    return np.cos(angles) * np.eye(3) + np.sin(angles) * cross + (1 - np.cos(angles)) / 3


def blur(images: Tensor, kernels: Array) -> Tensor:
    """Blurs each sample with its own kernel, along columns and rows in turn; the edge is mirrored.

    Args:
        images: (B, C, H, W) float32.
        kernels: One half of each kernel from the middle outwards (B, radius + 1).
    """
    radius = kernels.shape[1] - 1
    weights = torch.from_numpy(kernels).to(images)[:, :, None, None, None]
    # Reflection needs more pixels than it mirrors; on smaller images the edge is repeated instead.
    mode = "reflect" if radius < min(images.shape[-2:]) else "replicate"
    padded = F.pad(images, (radius,) * 4, mode=mode)
    for dim in (2, 3):  # a tap is a shifted view: for small kernels faster than a convolution in groups
        side = images.shape[dim]
        total = padded.narrow(dim, radius, side) * weights[:, 0]
        for tap in range(1, radius + 1):
            pair = padded.narrow(dim, radius - tap, side) + padded.narrow(dim, radius + tap, side)
            total.addcmul_(pair, weights[:, tap])
        padded = total
    return padded
