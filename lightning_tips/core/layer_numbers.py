"""The numbers that torch's layers keep beside their tensors (``out_channels``, ``groups``, ...), when these change.

Pure functions on torch objects.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.spectral_norm import SpectralNorm

_MULTIPLIER = "depthwise_multiplier"
"""Attribute of a depthwise convolution that is down to one channel: outputs of a channel. Copies and pickles have it, a
``state_dict`` has not: who loads one into a fresh network has a layer of several groups there, which says it all."""


def follow_shapes(module: nn.Module) -> None:
    """Sets the numbers that torch's layers keep beside their tensors (``out_channels``, ...) to what these have."""
    for layer in module.modules():
        _compute_again(layer)
        weight = getattr(layer, "weight", None)
        if isinstance(layer, _ConvNd) and isinstance(weight, Tensor):
            _follow_convolution(layer, weight)
        elif isinstance(layer, nn.Linear) and isinstance(weight, Tensor):
            layer.out_features, layer.in_features = weight.shape
        elif isinstance(layer, _NormBase):
            held = weight if isinstance(weight, Tensor) else layer.running_mean
            layer.num_features = layer.num_features if held is None else len(held)
        elif isinstance(layer, nn.GroupNorm) and isinstance(weight, Tensor):
            layer.num_channels = len(weight)
        elif isinstance(layer, nn.LayerNorm) and isinstance(weight, Tensor):
            layer.normalized_shape = tuple(weight.shape)
        elif isinstance(layer, nn.Embedding) and isinstance(weight, Tensor):
            layer.num_embeddings, layer.embedding_dim = weight.shape
        elif isinstance(layer, nn.PReLU) and isinstance(weight, Tensor):
            layer.num_parameters = weight.numel()


def _compute_again(layer: nn.Module) -> None:
    """Weights that a hook of torch computes before each call (masks, the old ``weight_norm`` and ``spectral_norm``)."""
    with torch.inference_mode(False), torch.no_grad():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):  # without a step of its power method
                setattr(layer, hook.name, hook.compute_weight(layer, do_power_iteration=False))
            elif type(hook).__module__.startswith("torch.nn.utils."):
                hook(layer, ())


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer convolves each channel alone. One that was cut to a single channel still does."""
    if not isinstance(layer, _ConvNd) or layer.groups != layer.in_channels:
        return False
    return layer.groups > 1 or _MULTIPLIER in vars(layer)


def _follow_convolution(layer: _ConvNd, weight: Tensor) -> None:
    transposed = isinstance(layer, _ConvTransposeNd)
    if is_depthwise(layer):
        # One group a channel: the weight is (groups * multiplier, 1, ...), transposed (groups, multiplier, ...).
        multiplier = vars(layer).get(_MULTIPLIER, layer.out_channels // layer.groups)
        layer.groups = len(weight) if transposed else len(weight) // multiplier
        if layer.groups == 1:  # an ordinary layer of one channel looks like this too
            vars(layer)[_MULTIPLIER] = multiplier
        else:
            vars(layer).pop(_MULTIPLIER, None)
    if transposed:
        layer.in_channels, layer.out_channels = weight.shape[0], weight.shape[1] * layer.groups
    else:
        layer.out_channels, layer.in_channels = weight.shape[0], weight.shape[1] * layer.groups
