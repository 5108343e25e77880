"""Tensors of labels: for each entry of an activation the id of the channel that it belongs to.

Labels have the shape of the activation, without its memory: along dimensions in which they do not change they are
expanded (stride 0). Operations that only move data are run on the labels as they are, so that channel shuffles,
splits, concatenations, windows and flattening come out right by construction.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ENTRIES = 2**26
"""More distinct labels than this in one tensor (512 MiB) end the analysis."""


def none(shape: torch.Size) -> Tensor:
    """Labels of a tensor that has no channels."""
    return torch.zeros((1,) * len(shape), dtype=torch.int64, device="cpu").expand(shape)


def thin(labels: Tensor) -> Tensor:
    """The labels with every expanded dimension shortened to 1."""
    for dim in range(labels.ndim):
        if labels.shape[dim] > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def compact(labels: Tensor) -> Tensor:
    """The same labels, expanded along every dimension in which they do not change."""
    shape = labels.shape
    if 0 in shape:
        return none(shape)
    small = thin(labels)
    if small.numel() > MAX_ENTRIES:
        raise MemoryError(f"the labels of a tensor of shape {tuple(shape)} take too much memory")
    for dim in range(small.ndim):
        if small.shape[dim] > 1:
            first = small.narrow(dim, 0, 1)
            if bool((small == first).all()):
                small = first
    if small.numel() > 1 and not small.is_contiguous():
        small = small.contiguous()
    return small.expand(shape)


def varies(labels: Tensor, dim: int) -> bool:
    """Whether compact labels change along a dimension."""
    return thin(labels).shape[dim] > 1


def varying(labels: Tensor) -> list[int]:
    """The dimensions along which compact labels change."""
    return [dim for dim, size in enumerate(thin(labels).shape) if size > 1]


def any_channel(labels: Tensor) -> bool:
    """Whether there is any channel in them."""
    return bool(thin(labels).any())


def along(labels: Tensor, dim: int) -> Tensor | None:
    """The labels along one dimension, or ``None`` if they change along another one."""
    dim %= labels.ndim
    small = thin(labels)
    if any(size > 1 for d, size in enumerate(small.shape) if d != dim):
        return None
    return small.reshape(-1).expand(labels.shape[dim])


def spread(ids: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """The labels of a tensor of ``shape`` whose channels are along ``dim``."""
    dim %= len(shape)
    return ids.reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
