"""What is left of an image when brightness, contrast, size and compression are taken away."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Fingerprints", "hash_sample", "image_thumbnails", "image_views", "take_fingerprints"]

SIDE = 16
"""Of a thumbnail, in pixels."""
FINE, COARSE = 0.7, 2.0
"""Standard deviations, in pixels of a thumbnail: finer detail is noise, what is coarser is light."""


@dataclass
class Fingerprints:
    """What samples are compared by.

    Attributes:
        hashes: (N,) of the bytes of each sample.
        thumbnails: (N, 16, 16) float32, of images.
        features: (N, D) float32 of unit norm, where those were given instead. Without either only identical samples
            are found.
    """

    hashes: list[bytes]
    thumbnails: Tensor | None = None
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hashes)

    def views(self, mirrored: bool = False) -> list[Tensor]:
        """(N, D) each; two samples are as similar as in the view in which they are most so."""
        if self.thumbnails is not None:
            return image_views(self.thumbnails.flip(-1) if mirrored else self.thumbnails)
        if self.features is None or mirrored:
            return []
        return [self.features]


def take_fingerprints(samples: Any) -> Fingerprints:
    """The fingerprints of images or of features.

    Args:
        samples: (N, C, H, W) images of any dtype, or a sequence of (C, H, W) ones of different sizes; or (N, D)
            features such as embeddings.

    Raises:
        ValueError: If they are of another shape, or not finite.
    """
    if isinstance(samples, np.ndarray):
        samples = torch.from_numpy(np.ascontiguousarray(samples))
    if not isinstance(samples, Tensor):
        thumbnails = [image_thumbnails(torch.as_tensor(one)[None]) for one in samples]
        if not thumbnails:
            raise ValueError("There are no images.")
        return Fingerprints([hash_sample(one) for one in samples], torch.cat(thumbnails))
    samples = samples.detach()
    hashes = [hash_sample(row) for row in samples.cpu()]
    if samples.ndim == 2:
        if not bool(torch.isfinite(samples).all()):
            raise ValueError("There are features that are not finite.")
        return Fingerprints(hashes, features=F.normalize(samples.float(), dim=1))
    return Fingerprints(hashes, image_thumbnails(samples))


def hash_sample(sample: Any) -> bytes:
    """16 bytes that two samples share only if all their numbers, their shapes and types are the same.

    Args:
        sample: A tensor, array, number, string, or mappings and sequences of such.
    """
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, sample)
    return digest.digest()


def _add(digest: Any, sample: Any) -> None:
    if isinstance(sample, Tensor):
        sample = sample.detach().cpu()
        sample = (sample.float() if sample.dtype == torch.bfloat16 else sample).numpy()
    if isinstance(sample, dict):
        sample = sorted(sample.items(), key=lambda item: str(item[0]))
    if isinstance(sample, Sequence) and not isinstance(sample, str | bytes):
        digest.update(f"[{len(sample)}".encode())
        for part in sample:
            _add(digest, part)
    elif isinstance(sample, str | bytes):
        digest.update(repr(sample).encode())
    else:
        array = np.asarray(sample)
        if array.dtype == object:
            raise TypeError(f"{type(sample).__name__} cannot be compared: it is neither numbers nor text.")
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())


def image_thumbnails(images: Tensor) -> Tensor:
    """Small grey images.

    Args:
        images: (N, C, H, W) of any dtype and range.

    Returns:
        (N, 16, 16) float32.

    Raises:
        ValueError: If they are of another shape, or not finite.
    """
    if images.ndim != 4 or not images.numel():
        raise ValueError(
            f"Images are (N, C, H, W) and features (N, D), not {tuple(images.shape)}. For other data give features,"
            " such as the embeddings of a network."
        )
    grey = images.float().mean(1, keepdim=True)
    small = F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)[:, 0]
    bad = torch.nonzero(~torch.isfinite(small).flatten(1).all(1)).flatten()
    if len(bad):
        raise ValueError(f"{len(bad)} images hold numbers that are not finite, the first at {int(bad[0])}.")
    return small


def image_views(thumbnails: Tensor) -> list[Tensor]:
    """Two views of thumbnails, whose scalar products are correlations.

    Fine detail and slow changes of light are filtered out, and what is left is made mean-free and of unit norm, so that
    brightness, contrast, noise, compression and size matter little. The second view is of the thumbnail moved so that
    its mass lies in the middle, by less than a pixel if need be: it is the same for an image and one moved by a few
    pixels. The move is in Fourier space, to where the phase of the first harmonic of rows and of columns is pi.

    Args:
        thumbnails: (N, 16, 16).

    Returns:
        Two of (N, 256) float32; rows of zeros for images of one colour.
    """
    frequencies = torch.fft.fftfreq(SIDE, 1 / SIDE, device=thumbnails.device)
    spectrum = torch.fft.fft2(thumbnails)
    down = torch.angle(spectrum[:, 1, 0])[:, None, None] - math.pi
    right = torch.angle(spectrum[:, 0, 1])[:, None, None] - math.pi
    turn = -(frequencies[:, None] * down + frequencies[None, :] * right)
    moved = torch.fft.ifft2(spectrum * torch.polar(torch.ones_like(turn), turn)).real
    return [_unit(thumbnails), _unit(moved)]


def _unit(thumbnails: Tensor) -> Tensor:
    size = thumbnails.abs().amax((1, 2))[:, None]
    smooth = _blur(thumbnails[:, None], FINE)
    rows = (smooth - _blur(smooth, COARSE)).flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    norm = rows.norm(dim=1, keepdim=True)
    return torch.where(norm > 1e-4 * size, rows / norm.clamp_min(1e-30), torch.zeros_like(rows))


def _blur(images: Tensor, sigma: float) -> Tensor:
    reach = int(3 * sigma + 0.5)
    bell = torch.exp(-(torch.arange(-reach, reach + 1, device=images.device).float() ** 2) / (2 * sigma**2))
    bell = bell / bell.sum()
    padded = F.pad(images, (reach, reach, reach, reach), "replicate")
    return F.conv2d(F.conv2d(padded, bell.view(1, 1, 1, -1)), bell.view(1, 1, -1, 1))
