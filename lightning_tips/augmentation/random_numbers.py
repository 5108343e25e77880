"""Random numbers that are a function of their address, so that no order of work can change them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["hashed", "uniforms"]

_STEP = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64: the golden ratio, odd


def uniforms(seeds: Tensor, streams: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), each addressed by (seed, stream, number).

    A sample's numbers depend on its seed alone: not on the batch that it is in, its place there, or what was drawn
    before. More streams or a higher count leave the first ones as they are. No global generator is touched.

    Args:
        seeds: (B,) int64 on any device.
        streams: How many independent streams each seed gets; an operation has one.
        count: Numbers in a stream.

    Returns:
        (B, streams, count).
    """
    bits = hashed(hashed(seeds.cpu().numpy().view(np.uint64))[:, None], np.arange(streams))
    bits = hashed(bits[:, :, None], np.arange(count))
    return (bits >> np.uint64(11)) * 2.0**-53


def hashed(words: NDArray[np.uint64], branch: NDArray[np.int64] | int = 0) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): 64 bits to 64 bits, one to one, every bit upon every other.

    Args:
        words: Any shape.
        branch: Several words from one; broadcast against ``words``.
    """
    with np.errstate(over="ignore"):
        words = words + (np.asarray(branch).astype(np.uint64) + np.uint64(1)) * _STEP
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))
