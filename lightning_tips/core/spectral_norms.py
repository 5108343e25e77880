"""Layers whose weight is divided by its largest singular value, by torch's old or new ``spectral_norm``.

Beside the weight they hold two vectors that come nearer to the singular ones with each training step: ``u`` along one
dimension of the weight, ``v`` along all others. Both have to follow when the weight is cut.

Pure functions on torch objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

ITERATIONS = 15
"""Of the power method after a cut: as many as torch does when it makes the vectors."""


class Spectral(NamedTuple):
    """What a spectral norm of a layer holds."""

    weight: Tensor  # before it is divided
    u: Tensor
    v: Tensor
    dim: int  # of the weight, along which u is

    @property
    def matrix(self) -> Tensor:
        """The weight as u and v see it."""
        return self.weight.detach().movedim(self.dim, 0).flatten(1)


def spectral_norms(layer: nn.Module) -> Iterator[Spectral]:
    """The spectral norms of a layer's own weights."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            weight, u, v = (getattr(layer, f"{hook.name}_{part}") for part in ("orig", "u", "v"))
            yield Spectral(weight, u, v, hook.dim % weight.ndim)
    if parametrize.is_parametrized(layer):
        for chain in layer.parametrizations.values():  # type: ignore[operator]
            first = chain[0]
            if len(chain) == 1 and isinstance(first, _SpectralNorm) and chain.original.ndim > 1:
                yield Spectral(chain.original, first._u, first._v, first.dim)


def settle_spectral_norms(module: nn.Module, changed: set[int]) -> None:
    """Computes ``u`` and ``v`` of layers anew whose weights were cut: what is left of them is no unit vector.

    Args:
        module: The network.
        changed: The ids of the tensors that were cut.
    """
    with torch.no_grad():
        for layer in module.modules():
            for norm in spectral_norms(layer):
                if {id(norm.weight), id(norm.u), id(norm.v)} & changed:
                    matrix = norm.matrix
                    for _ in range(ITERATIONS):
                        norm.v.copy_(F.normalize(matrix.T @ norm.u, dim=0, eps=1e-12))
                        norm.u.copy_(F.normalize(matrix @ norm.v, dim=0, eps=1e-12))
