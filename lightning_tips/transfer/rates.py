"""Learning rates by layer in an optimizer that is there already, its schedulers along with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer

from lightning_tips.core import group_rates, note_full_rates

FACTOR = "lr_factor"
"""Option of a parameter group: its rate as a share of what the user's optimizer had for it."""

# What torch's schedulers keep for each parameter group, and of it what is a rate.
_BY_GROUP = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "lr_lambdas", "base_momentums", "max_momentums")
_RATES = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")
# Rates that schedulers keep in the parameter groups themselves.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


def layer_scales(layers: int, decay: float) -> list[float]:
    """The rate of each layer group as a share of the head's: ``decay`` to the power of the distance from it.

    Example:
        >>> layer_scales(3, 0.5)
        [0.25, 0.5, 1.0]
    """
    return [decay ** (layers - 1 - layer) for layer in range(layers)]


def split_groups(
    optimizer: Optimizer, layer_of: Mapping[int, int], schedulers: Sequence[LRSchedulerConfig] = ()
) -> None:
    """Divides the parameter groups of an optimizer, in place, so that no group has parameters of two layer groups.

    Options and rates stay as they are, the state too, and the schedulers of the optimizer follow.

    Args:
        optimizer: The optimizer, between two steps.
        layer_of: Layer group by ``id`` of the parameter; others stay together.
        schedulers: Lightning's configs of all schedulers.
    """
    divided: list[dict[str, Any]] = []
    origin: list[int] = []
    for number, group in enumerate(optimizer.param_groups):
        places: dict[int, list[int]] = {}
        for place, parameter in enumerate(group["params"]):
            places.setdefault(layer_of.get(id(parameter), -1), []).append(place)
        for chosen in places.values():
            part = group if len(places) == 1 else dict(group)  # one that is not divided stays the object it is
            if part is not group:
                for key in ("params", "param_names"):
                    if key in group:
                        part[key] = [group[key][place] for place in chosen]
            divided.append(part)
            origin.append(number)
    if len(divided) > len(optimizer.param_groups):
        optimizer.param_groups[:] = divided
        _follow(optimizer, schedulers, origin)


def add_parameters(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], schedulers: Sequence[LRSchedulerConfig] = ()
) -> None:
    """Adds parameters that an optimizer does not hold, with the options of its fastest group.

    Args:
        optimizer: The optimizer, between two steps.
        parameters: Those that it holds already, by identity, are passed over.
        schedulers: Lightning's configs of all schedulers.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [p for p in parameters if id(p) not in held]
    if not missing:
        return
    rates = group_rates(optimizer)
    model = rates.index(max(rates))
    options = {k: v for k, v in optimizer.param_groups[model].items() if k not in ("params", "param_names")}
    named = "param_names" in optimizer.param_groups[model]
    count = len(optimizer.param_groups)
    new: Any = [(f"added.{i}", p) for i, p in enumerate(missing)] if named else missing
    optimizer.add_param_group({"params": new} | options)
    _follow(optimizer, schedulers, [*range(count), model])


def _follow(optimizer: Optimizer, schedulers: Sequence[LRSchedulerConfig], origin: Sequence[int]) -> None:
    """Gives the schedulers of an optimizer as many entries as it has groups now, each from where it came."""
    for scheduler in _flat(config.scheduler for config in schedulers):
        if scheduler.optimizer is optimizer:
            for name in _BY_GROUP:
                entries = getattr(scheduler, name, None)
                if isinstance(entries, list | tuple) and len(entries) > max(origin):
                    setattr(scheduler, name, [entries[number] for number in origin])


def set_rates(
    optimizer: Optimizer,
    scale_of: Mapping[int, float],
    lr: float | None = None,
    schedulers: Sequence[LRSchedulerConfig] = (),
    before: Mapping[int, float] | None = None,
) -> float | None:
    """Gives each parameter group its rate, and moves the schedulers, which go on from there.

    Args:
        optimizer: The optimizer; its groups are divided by layers.
        scale_of: Share of the rate by ``id`` of the parameter.
        lr: Full rate of a group whose share is 1 and that the user gave the largest rate; ``None`` is what the user's
            optimizer had.
        schedulers: Lightning's configs of all schedulers.
        before: The shares in force until now, for an optimizer that does not know; by default 1.

    Returns:
        The full rate of the fastest group now; ``None`` if the optimizer has nothing in ``scale_of``.
    """
    full = group_rates(optimizer)
    first = [id(group["params"][0]) if group["params"] else 0 for group in optimizer.param_groups]
    mine = [number for number, parameter in enumerate(first) if parameter in scale_of]
    if not mine:
        return None
    own = {
        n: full[n] / float(optimizer.param_groups[n].get(FACTOR, (before or {}).get(first[n], 1.0)) or 1.0)
        for n in mine
    }
    base = max(own.values())
    for number in mine:
        group = optimizer.param_groups[number]
        share = scale_of[first[number]] * (own[number] / base if base else 1.0)
        target = (base if lr is None else lr) * share
        if target == full[number]:
            continue
        ratio = target / full[number] if full[number] else 1.0
        group[FACTOR] = target / own[number] if own[number] else 1.0
        for key in _GROUP_RATES:
            if key in group:
                group[key] = target if group[key] == full[number] else group[key] * ratio
        for scheduler in _flat(config.scheduler for config in schedulers):
            if scheduler.optimizer is optimizer:
                for name in _RATES:
                    rates = getattr(scheduler, name, None)
                    if isinstance(rates, list) and len(rates) == len(optimizer.param_groups):
                        same = rates[number] == full[number]
                        rates[number] = target if same else rates[number] * ratio
    return max(group_rates(optimizer)[number] for number in mine)


def gradient_shares(optimizer: Optimizer) -> list[float] | None:
    """The share of the rate that each parameter group gets by auto-RGN: the relative norm of its gradient.

    Lee et al. 2023 (arXiv 2210.11466): layers whose gradient is large beside their weights are those that the new data
    asks to change. The group with the largest ratio gets all of the rate. A factor on all gradients, such as a loss
    scale, or clipping by the norm of all, changes nothing.

    Args:
        optimizer: An optimizer whose gradients are there, those of the coming step.

    Returns:
        A share in [0, 1] for each group; ``None`` where nothing has a gradient.
    """
    trained = [[p for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
    flat = [p for chosen in trained for p in chosen]
    if not flat:
        return None
    weights = iter(_squares([p.detach() for p in flat]))
    gradients = iter(_squares([p.grad.detach() for p in flat if p.grad is not None]))
    ratios = []
    for chosen in trained:
        weight, gradient = (sum(next(values) for _ in chosen) for values in (weights, gradients))
        ratios.append(math.sqrt(gradient / weight) if weight and math.isfinite(gradient) else 0.0)
    largest = max(ratios)
    return [ratio / largest for ratio in ratios] if largest else None


def _squares(tensors: Sequence[torch.Tensor]) -> list[float]:
    """Their squared norms, fetched from the device in one go."""
    return torch.stack([t.double().square().sum().to(tensors[0].device) for t in tensors]).tolist()


def keep_found_rate(optimizer: Optimizer, noted: Sequence[float], fixed: bool) -> None:
    """Undoes that a learning rate finder has given all parameter groups one rate: each keeps its ratio to the others.

    Args:
        optimizer: The optimizer.
        noted: The rate of each group before.
        fixed: Whether the phase has a rate of its own. Then the found one is for phases that have none.
    """
    found = {float(group["lr"]) for group in optimizer.param_groups}
    if len(found) != 1 or [float(group["lr"]) for group in optimizer.param_groups] == list(noted):
        return
    rate = found.pop()
    full = [before / float(group.get(FACTOR, 1.0)) for group, before in zip(optimizer.param_groups, noted, strict=True)]
    change = rate / (max(full) if fixed else max(noted))
    for group, before in zip(optimizer.param_groups, noted, strict=True):
        if fixed:
            group["lr"] = before
            group[FACTOR] = float(group.get(FACTOR, 1.0)) / change
        else:
            group["lr"] = before * change


def note_found_rates(schedulers: Sequence[LRSchedulerConfig]) -> None:
    """Lets the full rates follow where a learning rate finder has changed the rate after schedulers were made."""
    note_full_rates(schedulers)
    for scheduler in _flat(config.scheduler for config in schedulers):
        if isinstance(getattr(scheduler, "_last_lr", None), list):  # so that it is noted once
            scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _flat(schedulers: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for scheduler in schedulers:
        found += [scheduler, *_flat(getattr(scheduler, "_schedulers", ()))]
    return found
