"""The guard of a pruned network: whether it fell too far, and the last good network to go back to."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tips.core import resize_to

__all__ = ["DropGuard", "put_back", "take_snapshot"]


class DropGuard:
    """Compares a metric with what it was before pruning.

    Args:
        max_drop: How far it may stay below (``mode="max"``) or above, in units of the metric.
        mode: ``"max"`` or ``"min"``.
        reference: What it was before pruning; by default the last value before the first step.
    """

    def __init__(self, max_drop: float, mode: Literal["min", "max"], reference: float | None = None) -> None:
        self.max_drop = max_drop
        self.mode = mode
        self._given = reference
        self.reset()

    def reset(self) -> None:
        """Forgets the last run."""
        self.reference = self._given
        self.value: float | None = None

    def update(self, value: float | None) -> None:
        """Takes a new value of the metric, if there is one."""
        if value is not None:
            self.value = value

    def begin(self) -> None:
        """A pruning step is about to be made: what was measured until now is the network before it."""
        if self.reference is None and self.value is not None and math.isfinite(self.value):
            self.reference = self.value
        self.value = None

    @property
    def is_finite(self) -> bool:
        """Whether the last value can be a reference."""
        return self.value is not None and math.isfinite(self.value)

    @property
    def drop(self) -> float | None:
        """How far the metric is from the reference, positive when worse; ``None`` when nothing was measured since."""
        if self.value is None or self.reference is None:
            return None
        if not math.isfinite(self.value):
            return math.inf
        return self.reference - self.value if self.mode == "max" else self.value - self.reference

    @property
    def fell(self) -> bool:
        """Whether it is further than allowed. A value that is not finite is a fall."""
        drop = self.drop
        # The metric went through float32: a drop of exactly `max_drop` is none.
        return drop is not None and drop > self.max_drop + 1e-7 * max(1.0, abs(self.reference or 0.0))

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"reference": self.reference, "value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.reference, self.value = state["reference"], state["value"]


def take_snapshot(module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Everything that is needed to go back to the network as it is now.

    Args:
        module: Its state may hold no more than plain data, as in any checkpoint.
        optimizers: Those that hold its parameters.

    Returns:
        Plain data on the CPU: weights, and kind and state of each optimizer.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        "weights": _on_cpu(module.state_dict()),
        "optimizers": [
            {
                "kind": type(o).__name__,
                "state": _on_cpu(o.state_dict()["state"]),
                "groups": [[names.get(id(p)) for p in group["params"]] for group in o.param_groups],
                "called": [list(group["param_names"]) for group in o.param_groups if "param_names" in group],
            }
            for o in optimizers
        ],
    }


def put_back(module: nn.Module, optimizers: Sequence[Optimizer], snapshot: Mapping[str, Any]) -> list[str]:
    """Brings a network back to a snapshot: shapes, weights, buffers and optimizer state.

    Parameters keep their identity. Learning rates and other options of the optimizers stay as they are now, as
    schedulers go on. A DistributedDataParallel around the network has to be made anew.

    Args:
        module: The network, in whatever shape.
        optimizers: Those that hold its parameters.
        snapshot: From :func:`take_snapshot`.

    Returns:
        The kinds of those optimizers that were not there when it was taken, and begin without state.
    """
    resize_to(module, snapshot["weights"])
    module.load_state_dict(snapshot["weights"])
    for parameter in module.parameters():
        parameter.grad = None
    anew = []
    saved = list(snapshot["optimizers"])
    for number, optimizer in enumerate(optimizers):
        fits = number < len(saved) and saved[number]["kind"] == type(optimizer).__name__
        if number < len(saved):
            _regroup(module, optimizer, saved[number]["groups"], saved[number]["called"])
        if fits:
            now = optimizer.state_dict()
            optimizer.load_state_dict({"state": _copied(saved[number]["state"]), "param_groups": now["param_groups"]})
        else:
            optimizer.state.clear()
            anew.append(type(optimizer).__name__)
    return anew


def _regroup(
    module: nn.Module, optimizer: Optimizer, groups: Sequence[Sequence[str | None]], called: Sequence[list[str]]
) -> None:
    """Gives an optimizer the parameters that it had: those of a block that is back are new ones."""
    parameters = dict(module.named_parameters())
    own = {id(parameter) for parameter in parameters.values()}
    if len(groups) != len(optimizer.param_groups):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        wanted = [parameters[name] for group in groups for name in group if name is not None]
        optimizer.param_groups[0]["params"] += [p for p in wanted if id(p) not in held]
        return
    for group, names in zip(optimizer.param_groups, groups, strict=True):
        others = iter([p for p in group["params"] if id(p) not in own])  # not the module's
        group["params"] = [next(others) if name is None else parameters[name] for name in names]
    named = [group for group in optimizer.param_groups if "param_names" in group]  # made from named parameters
    if len(named) == len(called):
        for group, names in zip(named, called, strict=True):
            group["param_names"] = list(names)


def _on_cpu(value: Any) -> Any:
    return _mapped(value, lambda tensor: tensor.detach().to("cpu", copy=True))


def _copied(value: Any) -> Any:
    return _mapped(value, torch.clone)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(part, change) for part in value)
    return copy.copy(value)
