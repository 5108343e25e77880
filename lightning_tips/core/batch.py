"""Inputs and targets in batches of any form."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor

from lightning_tips.core.messages import did_you_mean

INPUT_KEYS = ("image", "images", "x", "input", "inputs", "pixel_values", "img", "data", "features")
TARGET_KEYS = ("label", "labels", "y", "target", "targets", "class", "cls")


def inputs_of(batch: Any, key: str | None = None) -> Any:
    """The inputs of a batch.

    Args:
        batch: ``(inputs, ...)``, a mapping, or the inputs themselves as a tensor.
        key: Key of the inputs in a mapping; by default one of :data:`INPUT_KEYS`. In nested batches the way to them,
            such as ``"views.image"``, or ``"0.1"`` for the second part of the first one.

    Raises:
        KeyError: If a mapping holds none under a known key; the message says what to pass.
        TypeError: If the batch is of another form.
    """
    if isinstance(batch, Tensor):
        return batch
    return _part(batch, key, INPUT_KEYS, 0, "input")


def targets_of(batch: Any, key: str | None = None) -> Any:
    """The targets of a batch, ``(inputs, targets, ...)`` or a mapping; otherwise like :func:`inputs_of`."""
    return _part(batch, key, TARGET_KEYS, 1, "target")


def split_batch(batch: Any, input_key: str | None = None, target_key: str | None = None) -> tuple[Any, Any]:
    """Inputs and targets of a batch; see :func:`inputs_of` and :func:`targets_of`."""
    return inputs_of(batch, input_key), targets_of(batch, target_key)


def _part(batch: Any, given: str | None, known: Sequence[str], position: int, role: str) -> Any:
    if _leads_inside(given, batch):
        for step in (steps := given.split(".")):
            try:
                batch = batch[step if isinstance(batch, Mapping) else int(step)]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise KeyError(
                    f"The batch has no {role} under {given!r}: {step!r} of {steps} leads nowhere."
                ) from error
        return batch
    if isinstance(batch, Mapping):
        if given is not None:
            if given not in batch:
                raise KeyError(f"The batch has no {role} under {given!r}. {did_you_mean(given, map(str, batch))}")
            return batch[given]
        for key in known:
            if key in batch:
                return batch[key]
        raise KeyError(
            f"Cannot tell which of the batch's keys {sorted(map(str, batch))} holds the {role}; pass {role}_key=..."
        )
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > position:
        return batch[position]
    raise TypeError(
        f"Expected a batch of (inputs, targets, ...) or a dict, got {type(batch).__name__}. Let the dataset return"
        " pairs or a dict."
    )


def replace_inputs(batch: Any, inputs: Any, key: str | None = None) -> Any:
    """A batch of the same form with other inputs; the batch itself stays as it is. See :func:`inputs_of`."""
    if isinstance(batch, Tensor):
        return inputs
    inputs_of(batch, key)  # raises for a batch of another form
    return _replaced(batch, inputs, key, INPUT_KEYS, 0)


def replace_targets(batch: Any, targets: Any, key: str | None = None) -> Any:
    """A batch of the same form with other targets; the batch itself stays as it is. See :func:`targets_of`."""
    targets_of(batch, key)
    return _replaced(batch, targets, key, TARGET_KEYS, 1)


def _leads_inside(given: str | None, batch: Any) -> TypeGuard[str]:
    """Whether a key is the way to something in a nested batch, such as ``"views.image"``."""
    return given is not None and "." in given and not (isinstance(batch, Mapping) and given in batch)


def _replaced(batch: Any, value: Any, given: str | None, known: Sequence[str], position: int) -> Any:
    if _leads_inside(given, batch):
        first, _, rest = given.partition(".")
        step: Any = first if isinstance(batch, Mapping) else int(first)
        inside = batch[step]
        if "." in rest or isinstance(inside, Mapping):
            value = _replaced(inside, value, rest, known, position)
        else:
            value = _replaced(inside, value, None, known, int(rest))
        return _replaced(batch, value, first if isinstance(batch, Mapping) else None, known, step)
    if isinstance(batch, Mapping):
        changed: Any = copy.copy(batch)  # a dict, or what behaves like one
        changed[given if given is not None else next(key for key in known if key in batch)] = value
        return changed
    parts = [*batch[:position], value, *batch[position + 1 :]]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
