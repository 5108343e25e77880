"""The groups of channels that go together, found by running the network once in eval and once in train mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_tips.core.layer_numbers import is_depthwise
from lightning_tips.core.resize import named_tensors
from lightning_tips.pruning.networks.copies import plain_attention, repeated
from lightning_tips.pruning.networks.limits import LimitReached
from lightning_tips.pruning.networks.measure import flop_counter
from lightning_tips.pruning.networks.runs import Forward
from lightning_tips.pruning.tracing import layer_rules
from lightning_tips.pruning.tracing.links import Key, Links
from lightning_tips.pruning.tracing.operations import tensors_in
from lightning_tips.pruning.tracing.trace import ChannelTrace

Array = Any  # np.ndarray


@dataclass
class Group:
    """Channels that can be removed one by one; each with everything that belongs to it.

    Args:
        units: The numbers of the channels, in the order of the first layer.
        per_unit: How many indices of each dimension of each tensor go with one of them.
        layers: Convolutions and linear layers whose output channels they are, with the indices of each unit:
            ``(units, indices per unit)``.
        residual: Whether they take part in a sum of branches.
        inexact: Whether the network takes a mean over them, so that fewer change the others' values.
        kind: What groups of the same kind have in common: the types of their tensors.
    """

    units: Array
    per_unit: dict[Key, int]
    layers: dict[str, Array]
    residual: bool
    inexact: bool
    kind: tuple[Any, ...]

    @property
    def name(self) -> str:
        """Its first layer."""
        return next(iter(self.layers))


@dataclass
class ChannelGraph:
    """What can be removed from a network, and what it would save.

    Args:
        groups: What can be removed.
        fixed: Layers with output channels that have to stay, and why.
        shapes: Shapes of all parameters and buffers, tied ones once.
        parameters: The names of the parameters among them.
        components: For each dimension, the number of the unit that each index belongs to.
        entries: The same for tensors whose single entries belong to units.
        at_least: How many indices of a dimension have to stay.
        weights: For convolutions and linear layers, the name of the weight.
        positions: How many times each of their weights is used for the example inputs.
        filters: Names of the dimensions that are output channels of convolutions.
        macs: Multiplications of the whole network on the example inputs.
        outputs: Shapes of the outputs in eval mode and in train mode (``None``: the network does not run in it).
        train_inputs: What it runs on in train mode.
        notes: What should be known.
    """

    groups: list[Group]
    fixed: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    parameters: list[str]
    components: dict[Key, Array]
    entries: dict[str, Array]
    at_least: dict[Key, int]
    weights: dict[str, str]
    positions: dict[str, float]
    filters: dict[str, Key]
    macs: int
    outputs: dict[str, list[tuple[int, ...]] | None]
    train_inputs: Any
    notes: list[str] = field(default_factory=list)


def analyse(model: nn.Module, inputs: Any, forward: Forward, deadline: float) -> ChannelGraph:
    """Finds the groups of a network.

    Args:
        model: A copy of the network: it gets marks.
        inputs: Example inputs; one sample is enough.
        forward: Runs the model on them.
        deadline: ``time.monotonic()`` at which to stop.

    Raises:
        ValueError: If the network cannot be run or takes too long.
    """
    links = Links()
    trace = ChannelTrace(model, links, deadline)
    notes: list[str] = []
    outputs: dict[str, list[tuple[int, ...]] | None] = {}
    macs = 0
    train_inputs = inputs
    twice = repeated(inputs)
    # Some layers need two samples when they train; where one is enough, it takes half of the time.
    for mode, given in (("eval", inputs), ("train", inputs), ("train", twice)):
        if mode in outputs:
            continue
        model.train(mode == "train")
        trace.count_positions = mode == "eval"
        try:
            with torch.no_grad(), plain_attention(), flop_counter() as counter, trace:
                result = forward(model, given)
                trace.fix_outputs(result)
        except (LimitReached, MemoryError, torch.OutOfMemoryError) as error:
            raise ValueError(f"The network cannot be analysed: {error}.") from error
        except Exception as error:
            if mode == "eval":
                raise ValueError(
                    "The network cannot be run on the example inputs, so nothing is known about which channels belong"
                    f" together: {type(error).__name__}: {error}"
                ) from error
            if given is inputs and twice is not inputs:
                continue
            outputs[mode] = None
            notes.append(f"the network does not run in train mode, so only eval mode was tried: {error}")
            continue
        if not tensors_in(result):
            raise ValueError("The network's outputs hold no tensor; pass forward=... that returns its outputs.")
        outputs[mode] = [tuple(tensor.shape) for tensor in tensors_in(result)]
        train_inputs = given
        if mode == "eval":
            macs = counter.get_total_flops() // 2
    return _graph(model, trace, links, macs, outputs, train_inputs, notes)


def _graph(
    model: nn.Module, trace: ChannelTrace, links: Links, macs: int, outputs: Any, train_inputs: Any, notes: list[str]
) -> ChannelGraph:
    tensors = {name: t for name, t in named_tensors(model).items() if trace.names.get(id(t)) == name}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _check_products(links, shapes)
    component, reasons, residual, inexact = links.components()
    fixed_numbers = np.zeros(len(component) + 1, dtype=bool)
    fixed_numbers[list(reasons)] = True
    components = {key: component[ids.numpy()] for key, ids in links.vectors.items() if key[1] >= 0}
    entries = {key[0]: component[ids.numpy()] for key, ids in links.vectors.items() if key[1] < 0}
    _fix_uneven(entries, fixed_numbers, reasons)

    # Units with the same number of indices in the same dimensions form a group: a sum of random numbers tells them.
    sums = np.zeros(len(component), dtype=np.uint64)
    generator = np.random.Generator(np.random.PCG64(0))
    every: list[tuple[Key, Array]] = [
        *components.items(),
        *(((name, -1), e.reshape(-1)) for name, e in entries.items()),
    ]
    counted = []
    for key, numbers in every:
        units, counts = np.unique(numbers, return_counts=True)
        counted.append((key, units, counts))
        sums[units] += counts.astype(np.uint64) * generator.integers(1, 2**63, dtype=np.uint64)

    weights, filters, rows = _rows(model, trace)
    groups: dict[int, Group] = {}
    group_of = np.zeros(len(component), dtype=np.uint64)
    group_of[:] = sums
    types = _kinds(model, trace)
    first_seen: dict[int, dict[Key, int]] = {}
    for key, units, counts in counted:
        alive = ~fixed_numbers[units]
        signatures, index = np.unique(group_of[units[alive]], return_index=True)
        for signature, at in zip(signatures.tolist(), index.tolist(), strict=True):
            first_seen.setdefault(signature, {})[key] = int(counts[alive][at])
    fixed: dict[str, str] = {}
    for layer, key in rows.items():
        if key not in components:
            used = (weights[layer], -1) in links.vectors
            fixed[layer] = "its weight is used outside of its forward" if used else "is not reached by the forward pass"
            continue
        numbers = components[key]
        for number in np.unique(numbers[fixed_numbers[numbers]]).tolist():
            fixed.setdefault(layer, reasons[number])
        free = ~fixed_numbers[numbers]
        for signature in dict.fromkeys(group_of[numbers[free]].tolist()):
            mine = np.flatnonzero(free & (group_of[numbers] == signature))
            group = groups.get(signature)
            if group is None:
                units = np.array(list(dict.fromkeys(numbers[mine].tolist())))
                keys = first_seen[signature]
                kind = tuple(sorted((types[key], count) for key, count in keys.items() if key in types))
                some = set(units.tolist())
                group = groups[signature] = Group(units, keys, {}, bool(some & residual), bool(some & inexact), kind)
            order = {number: place for place, number in enumerate(group.units.tolist())}
            places = np.array([order[number] for number in numbers[mine].tolist()])
            group.layers[layer] = mine[np.argsort(places, kind="stable")].reshape(len(group.units), -1)
    parameters = [name for name, _ in model.named_parameters()]
    return ChannelGraph(
        list(groups.values()), fixed, shapes, parameters, components, entries, dict(links.at_least), weights,
        trace.positions, filters, macs, outputs, train_inputs, notes,
    )  # fmt: skip


def _check_products(links: Links, shapes: dict[str, tuple[int, ...]]) -> None:
    """A tensor that is used both as a layer's weight and by itself has to stay."""
    for name in {key[0] for key in links.vectors if key[1] < 0}:
        if any(key[0] == name and key[1] >= 0 for key in links.vectors):
            for key in [key for key in links.vectors if key[0] == name]:
                links.fix(links.vectors[key], f"{name} is also used outside of its layer")


def _fix_uneven(entries: dict[str, Array], fixed: Array, reasons: dict[int, str]) -> None:
    """Entries that go have to be whole slices of their tensor; units for which they are not have to stay."""
    for name, numbers in entries.items():
        free = ~fixed[numbers]
        if not free.any():
            continue
        dim = _sliced_dim(numbers)
        if dim is None:
            for number in np.unique(numbers[free]).tolist():
                fixed[number] = True
                reasons[number] = f"belongs to entries of {name} that are no slices"


def _sliced_dim(numbers: Array) -> int | None:
    """The dimension along which entries change their unit, if there is exactly one."""
    changing = [d for d in range(numbers.ndim) if (numbers != np.take(numbers, [0], axis=d)).any()]
    if not changing:  # one unit for all: cannot be cut out of it
        return None
    return changing[0] if len(changing) == 1 else None


def _rows(model: nn.Module, trace: ChannelTrace) -> tuple[dict[str, str], dict[str, Key], dict[str, Key]]:
    """Names of weights; output dimensions of convolutions; output dimensions of all layers."""
    weights, filters, rows = {}, {}, {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (_ConvNd, nn.Linear)):
            continue
        held = [t for _, t in layer_rules.own_tensors(layer) if t.ndim > 1 and id(t) in trace.names]
        if not held:
            continue
        weight = trace.names[id(max(held, key=lambda tensor: tensor.numel()))]  # not the scales beside it
        transposed = isinstance(layer, _ConvTransposeNd) and layer.groups == 1 and not is_depthwise(layer)
        key = (weight, 1 if transposed else 0)
        weights[name] = weight
        rows[name] = key
        if isinstance(layer, _ConvNd):
            filters[name] = key
    return weights, filters, rows


def _kinds(model: nn.Module, trace: ChannelTrace) -> dict[Key, tuple[Any, ...]]:
    """For dimensions of weights: what kind of layer, and which side of it."""
    kinds: dict[Key, tuple[Any, ...]] = {}
    for layer in model.modules():
        if isinstance(layer, (_ConvNd, nn.Linear)):
            kernel = tuple(getattr(layer, "kernel_size", ()))
            groups = getattr(layer, "groups", 1)
            for _, tensor in layer_rules.own_tensors(layer):
                name = trace.names.get(id(tensor))
                if name is not None and tensor.ndim > 1:
                    for dim in (0, 1):
                        kinds[name, dim] = (type(layer).__name__, kernel, groups > 1, dim)
    return kinds


def removed_indices(graph: ChannelGraph, units: Sequence[int]) -> dict[str, list[Array | None]]:
    """What goes of each tensor with some units: for each dimension the indices, or ``None`` for none."""
    size = 1 + max((int(numbers.max()) for numbers in [*graph.components.values(), *graph.entries.values()]), default=0)
    gone = np.zeros(size, dtype=bool)
    gone[list(units)] = True
    result: dict[str, list[Array | None]] = {}
    for (name, dim), numbers in graph.components.items():
        lost = np.flatnonzero(gone[numbers])
        if len(lost):
            result.setdefault(name, [None] * len(graph.shapes[name]))[dim] = lost
    for name, numbers in graph.entries.items():
        mask = gone[numbers]
        if mask.any():
            sliced = _sliced_dim(numbers)
            assert sliced is not None
            lost = np.flatnonzero(mask.any(axis=tuple(d for d in range(mask.ndim) if d != sliced)))
            result.setdefault(name, [None] * len(graph.shapes[name]))[sliced] = lost
    return result
