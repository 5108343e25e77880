"""The output channels of a convolution or linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def filters_of(layer: nn.Module) -> Tensor:
    """The weights of each output channel, ``(out_channels, weights of a filter)``, float32 (float64 stays)."""
    return by_channel(layer, weight_of(layer).detach())


def channels_of(layer: nn.Module) -> int:
    """The number of output channels of a convolution or linear layer."""
    return layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features  # type: ignore[return-value]


def channel_dim_of(layer: nn.Module) -> int:
    """The dimension of the channels in the layer's output, from the end: with and without a batch dimension."""
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1


def weight_of(layer: nn.Module) -> Tensor:
    """The layer's weight, as the parameter it is or as its parametrisation computes it."""
    return layer.weight  # type: ignore[return-value]


def by_channel(layer: nn.Module, values: Tensor) -> Tensor:
    """``values`` of the weight's shape as ``(out_channels, weights of a filter)``, in at least float32."""
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, ...)
        values = values.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    values = values.flatten(1)
    return values if values.dtype == torch.float64 else values.float()
