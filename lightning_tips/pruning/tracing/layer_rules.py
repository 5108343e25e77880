"""What layers do with channels: the rules of the trace for convolutions, linear layers and norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from lightning_tips.core.layer_numbers import is_depthwise
from lightning_tips.core.spectral_norms import spectral_norms
from lightning_tips.pruning.tracing import labels as lb

if TYPE_CHECKING:
    from lightning_tips.pruning.tracing.trace import ChannelTrace

_PLAIN = {
    layer.forward
    for layer in (
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.Linear,
    )
}


def apply(trace: ChannelTrace, layer: nn.Module, name: str, labels: Tensor, output: Tensor) -> Tensor:
    """Links the tensors of a layer with the channels that come in, and returns the labels of what comes out."""
    if isinstance(layer, _ConvNd):
        return _convolution(trace, layer, name, labels, output)
    if isinstance(layer, nn.Linear):
        return _weighted(trace, layer, name, labels, output, -1)
    if isinstance(layer, nn.LayerNorm):
        return _layer_norm(trace, layer, name, labels, output)
    if isinstance(layer, nn.GroupNorm):
        return _group_norm(trace, layer, name, labels, output)
    if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
        return labels
    assert isinstance(layer, (_NormBase, nn.PReLU))
    return _per_channel(trace, layer, name, labels, output, 1)


def positions(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> float:
    """How many times each weight is used in a call: multiplications are this times the number of weights."""
    if isinstance(layer, _ConvTransposeNd):
        return args[0].numel() / layer.in_channels
    if isinstance(layer, _ConvNd):
        return output.numel() / layer.out_channels
    assert isinstance(layer, nn.Linear)
    return output.numel() / layer.out_features


def own_tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a layer and of its parametrizations, with their names in it."""
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        yield name, tensor
    if parametrize.is_parametrized(layer):
        held = layer.get_submodule("parametrizations")
        for name, tensor in [*held.named_parameters(), *held.named_buffers()]:
            yield f"parametrizations.{name}", tensor


def fix_layer(trace: ChannelTrace, layer: nn.Module, name: str, reason: str) -> None:
    """Says that nothing may be cut from a layer."""
    for _, tensor in own_tensors(layer):
        key = trace.names.get(id(tensor))
        if key is not None:
            for dim, size in enumerate(tensor.shape):
                trace.links.fix(trace.links.vector((key, dim), size), reason)


def _along(trace: ChannelTrace, labels: Tensor, dim: int) -> Tensor | None:
    """The labels along a dimension, if all that differs along others has been linked."""
    found = lb.along(labels, dim)
    if found is None:
        settled = trace.links.settled(lb.thin(labels)).expand(labels.shape)
        found = lb.along(lb.compact(settled), dim)
    dim %= labels.ndim
    if found is None and lb.varies(labels, dim):
        # Several channels at one place of what the layer takes for a channel, as after a pixel shuffle: all go or none.
        small = first = lb.thin(labels)
        for d in range(labels.ndim):
            if d != dim:
                first = first.narrow(d, 0, 1)
        trace.links.join(small, first, "a layer that takes them for one channel")
        if bool((small == 0).any()):  # of these some have to stay, so all
            return None
        found = first.reshape(-1)
    return found


def _refuse(trace: ChannelTrace, layer: nn.Module, name: str, labels: Tensor, output: Tensor, reason: str) -> Tensor:
    trace.links.fix(lb.thin(labels), reason)
    fix_layer(trace, layer, name, reason)
    return lb.none(output.shape)


def _convolution(trace: ChannelTrace, layer: _ConvNd, name: str, labels: Tensor, output: Tensor) -> Tensor:
    dim = -1 - len(layer.kernel_size)
    transposed, links = isinstance(layer, _ConvTransposeNd), trace.links
    depthwise = is_depthwise(layer)
    if layer.groups == 1 and not depthwise:
        return _weighted(trace, layer, name, labels, output, dim, transposed)
    channels = _along(trace, labels, dim)
    if channels is None:
        return _refuse(trace, layer, name, labels, output, f"comes into {name} as more than channels")
    groups = layer.groups
    if transposed and not depthwise:
        return _refuse(trace, layer, name, labels, output, f"{name} is a transposed convolution in groups")
    if transposed:  # depthwise: the weight is (channels, outputs of a channel, ...)
        if layer.out_channels != groups:
            return _refuse(trace, layer, name, labels, output, f"{name} is a transposed convolution in groups")
        found: tuple[Tensor, Tensor | None] | None = (_first_dimension(trace, layer, name), None)
    else:
        found = _rows_and_columns(trace, layer, name, (0, None if depthwise else 1))
    if found is None:
        return _refuse(trace, layer, name, labels, output, f"{name} has tensors of unknown meaning")
    rows, columns = found
    if _is_computed(layer):
        links.mark("inexact", channels)
        links.mark("inexact", rows)
    if depthwise:
        links.join(rows.reshape(groups, -1), channels.reshape(groups, 1), name)
    else:
        # The same place in every group, so that all groups stay equally large.
        assert columns is not None
        links.join(channels.reshape(groups, -1), columns.reshape(1, -1), name)
        by_group = rows.reshape(groups, -1)
        links.join(by_group, by_group[:1], name)
        weight = _weight_name(trace, layer)
        if weight is not None and layer.in_channels // groups > 1:
            links.at_least[weight, 1] = 2  # with one channel a group it would pass for depthwise
    return lb.spread(rows, dim, output.shape)


def _weighted(
    trace: ChannelTrace,
    layer: nn.Module,
    name: str,
    labels: Tensor,
    output: Tensor,
    dim: int,
    transposed: bool = False,
) -> Tensor:
    channels = _along(trace, labels, dim)
    if channels is None:
        return _refuse(trace, layer, name, labels, output, f"comes into {name} as more than channels")
    found = _rows_and_columns(trace, layer, name, (1, 0) if transposed else (0, 1))
    if found is None:
        return _refuse(trace, layer, name, labels, output, f"{name} has tensors of unknown meaning")
    rows, columns = found
    assert columns is not None
    trace.links.join(channels, columns, name)
    if _is_computed(layer):
        trace.links.mark("inexact", channels)
        trace.links.mark("inexact", rows)
    return lb.spread(rows, dim, output.shape)


def _is_computed(layer: nn.Module) -> bool:
    """Whether a weight may depend on others that go, such as one that is standardised over what comes in."""
    computed = parametrize.is_parametrized(layer) or any(True for _ in spectral_norms(layer))
    return computed or type(layer).forward not in _PLAIN


def _rows_and_columns(
    trace: ChannelTrace, layer: nn.Module, name: str, dims: tuple[int, int | None]
) -> tuple[Tensor, Tensor | None] | None:
    """The ids of a layer's outputs and inputs, linked over all tensors that it has; ``None`` if one is unknown."""
    shape = _shape(layer)
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    left = {id(norm.u): norm for norm in spectral_norms(layer)}
    right = {id(norm.v): norm for norm in spectral_norms(layer)}
    if any(norm.dim != dims[0] for norm in left.values()):
        return None
    for own, tensor in own_tensors(layer):
        key = trace.names.get(id(tensor))
        if key is None or tensor.numel() <= 1:
            continue
        if id(tensor) in left:
            rows.append(trace.links.vector((key, 0), len(tensor)))
        elif id(tensor) in right:
            if dims[1] is not None:  # for each input all its places in the kernel
                places = trace.links.vector((key, 0), len(tensor)).reshape(shape[dims[1]], -1)
                trace.links.join(places, places[:, :1], name)
                columns.append(places[:, 0])
        elif tensor.shape == shape:
            rows.append(trace.links.vector((key, dims[0]), shape[dims[0]]))
            if dims[1] is not None:
                columns.append(trace.links.vector((key, dims[1]), shape[dims[1]]))
        elif dims[0] == 0 and tensor.shape[0] == shape[0] and tensor.numel() == shape[0]:
            rows.append(trace.links.vector((key, 0), shape[0]))
        elif own == "bias" and tensor.ndim == 1 and len(tensor) == shape[dims[0]]:
            rows.append(trace.links.vector((key, 0), len(tensor)))
        else:
            return None
    if not rows or (dims[1] is not None and not columns):
        return None
    for others in (rows, columns):
        for other in others[1:]:
            trace.links.join(others[0], other, name)
    return rows[0], columns[0] if columns else None


def _weight_name(trace: ChannelTrace, layer: nn.Module) -> str | None:
    held = [tensor for _, tensor in own_tensors(layer) if tensor.ndim > 1 and id(tensor) in trace.names]
    return trace.names[id(max(held, key=lambda tensor: tensor.numel()))] if held else None


def _shape(layer: nn.Module) -> torch.Size:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape


def _first_dimension(trace: ChannelTrace, layer: nn.Module, name: str) -> Tensor:
    """The ids along the weight's first dimension, linked with those of the bias."""
    weight = _weight_name(trace, layer)
    assert weight is not None
    ids = trace.links.vector((weight, 0), _shape(layer)[0])
    bias = layer.bias
    if isinstance(bias, Tensor) and id(bias) in trace.names:
        trace.links.join(ids, trace.links.vector((trace.names[id(bias)], 0), len(bias)), name)
    return ids


def _per_channel(trace: ChannelTrace, layer: nn.Module, name: str, labels: Tensor, output: Tensor, dim: int) -> Tensor:
    if output.shape != labels.shape:
        return _refuse(trace, layer, name, labels, output, f"{name} changes the shape")
    size = labels.shape[dim]
    tensors = [(trace.names.get(id(t)), t) for _, t in own_tensors(layer) if t.numel() > 1]
    if any(t.shape != (size,) for _, t in tensors):
        return _refuse(trace, layer, name, labels, output, f"{name} has tensors of unknown meaning")
    channels = _along(trace, labels, dim)
    if channels is None:
        if tensors:
            return _refuse(trace, layer, name, labels, output, f"comes into {name} as more than channels")
        return labels
    for key, _ in tensors:
        if key is not None:
            trace.links.join(channels, trace.links.vector((key, 0), size), name)
    return lb.spread(channels, dim, output.shape)


def _layer_norm(trace: ChannelTrace, layer: nn.LayerNorm, name: str, labels: Tensor, output: Tensor) -> Tensor:
    trace.links.mark("inexact", lb.thin(labels))
    if len(layer.normalized_shape) != 1:
        return _refuse(trace, layer, name, labels, output, f"{name} normalises over several dimensions")
    size = layer.normalized_shape[0]
    last = type(layer).forward is nn.LayerNorm.forward or output.shape[1] != size
    if output.ndim > 2 and output.shape[1] == output.shape[-1] and lb.varying(labels) == [labels.ndim - 1]:
        last = True
    elif not last and output.ndim > 2 and output.shape[-1] == size:
        return _refuse(trace, layer, name, labels, output, f"{name} normalises over an unknown dimension")
    if layer.weight is None and layer.bias is None:  # its normalized_shape would not follow
        return _refuse(trace, layer, name, labels, output, f"{name} has a fixed size")
    return _per_channel(trace, layer, name, labels, output, -1 if last else 1)


def _group_norm(trace: ChannelTrace, layer: nn.GroupNorm, name: str, labels: Tensor, output: Tensor) -> Tensor:
    trace.links.mark("inexact", lb.thin(labels))
    if layer.num_groups > 1:
        channels = _along(trace, labels, 1)
        if channels is None or len(channels) == layer.num_groups:
            return _refuse(trace, layer, name, labels, output, f"{name} has a fixed number of groups")
        by_group = channels.reshape(layer.num_groups, -1)
        trace.links.join(by_group, by_group[:1], name)
    return _per_channel(trace, layer, name, labels, output, 1)
