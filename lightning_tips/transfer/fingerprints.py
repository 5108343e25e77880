"""Fingerprints of the samples in a batch, by their bits, computed where the batch lies."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# What torch has signed integers for, by size in bytes.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def fingerprints(args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *more: Any) -> list[tuple[Any, ...]]:
    """One fingerprint for each sample that a module is called with.

    128 bits of each tensor, by multilinear hashing: the sum of the sample's words times random 64-bit numbers, twice
    (Dietzfelbinger 1996; strongly universal in the upper half). The chance that two of a million samples meet is about
    1 in 10^7.

    Args:
        args: What the module is called with: tensors of any dtype, all with one row for each sample, and plain values.
        kwargs: Likewise, by name.
        *more: What else makes a difference.

    Returns:
        Hashable, equal for equal bits.

    Raises:
        ValueError: For arguments of another kind.

    Example:
        >>> import torch
        >>> first, second, third = fingerprints((torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]),))
        >>> first == third, first == second
        (True, False)
    """
    named = [*enumerate(args), *(kwargs or {}).items()]
    tensors = [value for _, value in named if isinstance(value, Tensor)]
    rest = [(name, value) for name, value in named if not isinstance(value, Tensor)]
    if wrong := [type(v).__name__ for _, v in rest if not isinstance(v, int | float | str | bool | None)]:
        raise ValueError(f"it is called with a {wrong[0]}, not with tensors and plain values")
    lengths = {len(tensor) if tensor.ndim else -1 for tensor in tensors}
    if len(lengths) != 1 or lengths == {-1}:
        raise ValueError("it is not called with tensors that have one row for each sample")
    plain = (*(name for name, _ in named), *rest, *more)
    words = torch.cat([_hash(tensor.detach()) for tensor in tensors], 1).tolist()
    shapes = tuple((tensor.dtype, tuple(tensor.shape[1:])) for tensor in tensors)
    return [(*row, shapes, plain) for row in words]


def _hash(tensor: Tensor) -> Tensor:
    """(B, 2), int64."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype == torch.bool:
        tensor = tensor.to(torch.uint8)
    words = tensor.reshape(len(tensor), -1).contiguous().view(_INTEGERS[tensor.element_size()]).long()
    factors = _factors(words.shape[1], words.device)
    return torch.stack([(words * row).sum(1) for row in factors], 1)


@lru_cache(maxsize=4)
def _factors(count: int, device: torch.device) -> Tensor:
    """(2, count) random odd numbers, the same in each process."""
    generator = torch.Generator().manual_seed(0x7EA7)
    drawn = torch.randint(-(2**63), 2**63 - 1, (2, count), generator=generator, dtype=torch.int64)
    return (drawn | 1).to(device)
