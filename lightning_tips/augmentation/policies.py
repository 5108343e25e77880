"""Policies: from a name, a yaml or objects to a list of operations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_tips.augmentation.operations import (
    OPERATIONS,
    Blur,
    Brightness,
    Contrast,
    Crop,
    Erase,
    HorizontalFlip,
    Hue,
    Operation,
    Rotate,
    Saturation,
    Shift,
)
from lightning_tips.core import did_you_mean

__all__ = ["POLICIES", "Policy", "Step", "describe_policy", "read_policy"]

Step = Operation | Callable[[Tensor], Tensor]
"""An operation, or any callable from one image (C, H, W) to one of the same shape: a torchvision v2 transform, say."""
Policy = str | Sequence[Any]

POLICIES: dict[str, tuple[Operation, ...]] = {
    "light": (HorizontalFlip(), Shift(0.125)),
    "standard": (
        HorizontalFlip(),
        Rotate(15),
        Shift(0.125),
        Brightness(0.2),
        Contrast(0.2),
        Saturation(0.2),
        Hue(0.05),
        Blur((0.1, 1.0), p=0.1),
    ),
    "strong": (
        HorizontalFlip(),
        Rotate(30),
        Crop((0.5, 1.0)),
        Brightness(0.4),
        Contrast(0.4),
        Saturation(0.4),
        Hue(0.1),
        Blur((0.1, 2.0), p=0.2),
        Erase(p=0.25),
    ),
}
"""The named ones. On images that are not RGB they leave ``Saturation`` and ``Hue`` out."""


def read_policy(policy: Policy) -> list[Step]:
    """The steps of a policy.

    Args:
        policy: ``"light"``, ``"standard"``, ``"strong"``, or a list of steps. A step is an operation
            (``Rotate(15)``), its name (``"HorizontalFlip"``), its name with its arguments
            (``{"Rotate": {"degrees": 15}}``), ``{"class_path": ..., "init_args": ...}`` for any class that can be
            imported, or a callable from one image (C, H, W) to another of its shape.

    Raises:
        ValueError: For unknown names and arguments out of their domain.
        TypeError: For anything else.

    Example:
        >>> read_policy(["HorizontalFlip", {"Rotate": {"degrees": 15}}])
        [HorizontalFlip(p=0.5), Rotate(p=1.0, degrees=(-15.0, 15.0))]
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"There is no policy {policy!r}. {did_you_mean(policy, POLICIES)}")
        return list(POLICIES[policy])
    if isinstance(policy, Mapping) or not isinstance(policy, Sequence):
        raise TypeError(f"A policy is a name ({', '.join(POLICIES)}) or a list of operations, not {policy!r}.")
    return [_read_step(step) for step in policy]


def _read_step(step: Any) -> Step:
    if isinstance(step, Operation):
        return step
    if isinstance(step, str):
        return _build(step, {})
    if isinstance(step, Mapping):
        if "class_path" in step:
            return _build(str(step["class_path"]), step.get("init_args") or {})
        if len(step) == 1:
            (name, arguments), *_ = step.items()
            return _build(str(name), arguments or {})
        raise TypeError(f"The step {dict(step)} names {len(step)} operations; begin each with a dash of its own.")
    if callable(step) and not isinstance(step, type):
        return step
    raise TypeError(f"{step!r} is no step of a policy: give an operation, its name, or a transform of one image.")


def _build(path: str, arguments: Any) -> Step:
    module, _, name = path.rpartition(".")
    if not isinstance(arguments, Mapping):
        raise TypeError(f"{name}: its arguments must be given by name, such as {{p: 0.5}}, not {arguments!r}.")
    if module and module != __package__:
        try:
            kind = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"The transform {path!r} cannot be imported: {error}") from error
        try:
            made: Step = kind(**arguments)
        except TypeError as error:
            raise ValueError(f"{path} does not take {dict(arguments)}: {error}") from error
        return made
    if name not in OPERATIONS:
        raise ValueError(
            f"There is no operation {name!r}. {did_you_mean(name, OPERATIONS)} Transforms of other packages go by their"
            " full path, such as torchvision.transforms.v2.TrivialAugmentWide."
        )
    known = OPERATIONS[name].__dataclass_fields__
    if unknown := [key for key in arguments if key not in known]:
        raise ValueError(f"{name} has no argument {unknown[0]!r}. {did_you_mean(str(unknown[0]), known)}")
    return OPERATIONS[name](**arguments)


def describe_policy(policy: Policy) -> str:
    """A policy in a few words, for tables."""
    if isinstance(policy, str):
        return policy
    return ", ".join(type(step).__name__ for step in read_policy(policy)) or "nothing"
