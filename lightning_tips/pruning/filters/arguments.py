"""What plan_filters is given, checked before anything is done."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_tips.core import did_you_mean
from lightning_tips.pruning.filters.plan import SCOPES
from lightning_tips.pruning.ranking.criteria import Criterion


def model_layers(model: nn.Module) -> list[str]:
    """The names of convolutions and linear layers, in the order of the modules."""
    return [name for name, layer in model.named_modules() if isinstance(layer, (_ConvNd, nn.Linear))]


def check_model(model: nn.Module) -> None:
    """Raises ``ValueError`` for what cannot be pruned."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("Pass the network inside of DistributedDataParallel (model.module), and wrap it again after.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("A scripted network cannot be pruned; pass the nn.Module that it was made from.")
    if hasattr(model, "_orig_mod"):
        raise ValueError("Pass the network that was compiled (model._orig_mod), and compile it again after.")
    if not any(isinstance(layer, _ConvNd) for layer in model.modules()):
        raise ValueError("The network has no convolution, so there are no filters to prune.")


def check_arguments(
    model: nn.Module,
    criterion: Criterion,
    target: Mapping[str, float] | None,
    filters: int | None,
    scope: str,
    floor: float,
    round_to: int | None,
) -> dict[str, float]:
    """Checks the plain arguments of ``plan_filters``, and returns the target with its full names."""
    if (target is None) == (filters is None):
        raise ValueError('Pass either target, such as {"macs": 0.5}, or filters, the number to remove.')
    if scope not in SCOPES:
        raise ValueError(f"Unknown scope {scope!r}. {did_you_mean(scope, SCOPES)}")
    if not 0 <= floor < 1:
        raise ValueError(f"floor is the share of channels that stays, from 0 to below 1, not {floor}.")
    if round_to is not None and round_to < 1:
        raise ValueError(f"round_to must be at least 1, not {round_to}.")
    if filters is not None and filters < 1:
        raise ValueError(f"filters must be at least 1, not {filters}.")
    goals: dict[str, float] = {}
    for name, share in (target or {}).items():
        known = {"params": "parameters"}.get(name, name)
        if known not in ("macs", "parameters", "filters"):
            raise ValueError(f"Unknown target {name!r}. {did_you_mean(name, ('macs', 'parameters', 'filters'))}")
        if not 0 < share < 1:
            raise ValueError(f"The target {name} is a share between 0 and 1, not {share}.")
        goals[known] = float(share)
    if target is not None and not goals:
        raise ValueError('The target is empty; pass one such as {"macs": 0.5}.')
    return goals


def matching(model: nn.Module, patterns: Iterable[str], what: str) -> list[str]:
    """The layers that names and patterns stand for; ``what`` is the argument they come from."""
    names = [name for name, _ in model.named_modules() if name]
    layers = model_layers(model)
    found: dict[str, None] = {}
    for pattern in patterns:
        modules = fnmatch.filter(names, pattern)
        mine = [layer for layer in layers if any(layer == m or layer.startswith(m + ".") for m in modules)]
        if not mine:
            wrong = "has no convolution or linear layer" if modules else "is no layer of the network"
            raise ValueError(f"{what}: {pattern!r} {wrong}. {did_you_mean(pattern, layers)}")
        found.update(dict.fromkeys(mine))
    return list(found)
