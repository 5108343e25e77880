"""What can be wrong with the outputs of members, their targets and their weights; errors name the member."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_tips.core import did_you_mean

__all__ = ["Task", "as_weights", "check_choice", "check_outputs", "check_targets", "member_name"]

Task = Literal["multiclass", "multilabel", "regression"]


def check_choice(what: str, given: Any, known: Any) -> None:
    """Raises a ValueError that lists what there is, unless ``given`` is one of the literals ``known``."""
    if given not in get_args(known):
        raise ValueError(f"There is no {what} {given!r}. {did_you_mean(str(given), get_args(known))}")


def member_name(index: int, names: Sequence[str] | None = None) -> str:
    """What error messages and plots call a member: its name, or its number, from 0."""
    return f"member {index}" if names is None else f"member {index} ({names[index]})"


def check_outputs(output: Tensor, task: Task = "multiclass", member: str = "member 0") -> None:
    """Checks what one member has predicted. Waits for the device.

    Args:
        output: ``(N, C, ...)`` probabilities of classes; for ``"multilabel"`` ``(N, C)`` of labels; for
            ``"regression"`` ``(N, ...)`` means. Floating point, any precision.
        task: What the output is.
        member: What to call the member in errors.

    Raises:
        TypeError: Not floating point.
        ValueError: The shape does not fit, a number is not finite or outside [0, 1], or the probabilities of classes
            do not sum to 1 (to 0.001, or to 0.02 in half precision).
    """
    output = output.detach()
    if not output.is_floating_point():
        raise TypeError(f"{member} yields {output.dtype}; floating point was expected.")
    needed = 1 if task == "regression" else 2
    if output.ndim < needed:
        raise ValueError(f"{member} yields the shape {tuple(output.shape)}; at least {needed} dimensions are expected.")
    if task == "multiclass" and output.shape[1] < 2:
        raise ValueError(
            f"{member} yields {output.shape[1]} class of probabilities. With one output p for two classes pass"
            " torch.cat([1 - p, p], 1); to an EnsembleModule, whose members return a logit, to_probabilities='binary'."
        )
    if not output.numel():
        return
    low, high = (float(end) for end in torch.aminmax(output))  # NaN if there is one
    if low != low:
        raise ValueError(f"{member} yields NaN. Leave it out, or train it again.")
    if low == -float("inf") or high == float("inf"):
        raise ValueError(f"{member} yields infinite numbers. Leave it out, or train it again.")
    if task == "regression":
        return
    half = output.dtype in (torch.float16, torch.bfloat16)
    tolerance = 0.02 if half else 1e-3
    logits = "sigmoid" if task == "multilabel" else "softmax(dim=1)"
    if low < -tolerance or high > 1 + tolerance:
        kind = "log-probabilities: pass .exp() of them" if high <= tolerance else f"logits: pass {logits} of them"
        raise ValueError(f"{member} yields numbers from {low:.3g} to {high:.3g}, not probabilities. Are they {kind}?")
    if task == "multiclass":
        sums = output.sum(1, dtype=torch.float32 if half else None)
        off = float((sums - 1).abs().max())
        if off > tolerance:
            raise ValueError(
                f"{member} yields probabilities that are off a sum of 1 by up to {off:.3g}. Are they logits (pass"
                " softmax(dim=1) of them), or several labels for a sample (task='multilabel')?"
            )


def check_targets(targets: Tensor, shape: Sequence[int], task: Task = "multiclass") -> None:
    """Checks targets against the shape of one member's output.

    Args:
        targets: Class indices ``(N, ...)``, labels ``(N, C)`` of 0 and 1, or numbers ``(N, ...)``.
        shape: ``(N, C, ...)``, or for ``"regression"`` ``(N, ...)``.
        task: What the targets are.

    Raises:
        TypeError: Class indices that are not integers.
        ValueError: No samples, another shape, or values that are none of the above.
    """
    shape = tuple(shape)
    if not shape[0]:
        raise ValueError("There are no samples: weights and temperatures need a split of their own to be fitted on.")
    expected = (shape[0], *shape[2:]) if task == "multiclass" else shape
    if tuple(targets.shape) != expected:
        hint = ""
        if task == "multiclass" and tuple(targets.shape) == shape:
            hint = " Pass task='multilabel' if a sample can have several labels, argmax(1) if they are one-hot."
        raise ValueError(f"Targets of shape {expected} belong to these outputs, not {tuple(targets.shape)}.{hint}")
    if task == "multiclass":
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(f"Targets are class indices, integers, not {targets.dtype}.")
        low, high = (int(end) for end in torch.aminmax(targets))
        if low < 0 or high >= shape[1]:
            raise ValueError(f"Targets must lie in 0 ... {shape[1] - 1}, but there are {low} ... {high}.")
    elif task == "multilabel":
        if not ((targets == 0) | (targets == 1)).all():
            raise ValueError("Targets of several labels are 0 and 1.")
    elif not torch.isfinite(targets).all():
        raise ValueError("Some targets are not finite.")


def as_weights(weights: Sequence[float] | Tensor | None, members: int, like: Tensor | None = None) -> Tensor:
    """Weights of the members that sum to 1.

    Args:
        weights: One for each member, in any unit, none below 0, not all 0; None: all the same.
        members: How many there are.
        like: Whose device and, if it is of 32 bits or more, precision to take; None: float64 on the CPU.

    Returns:
        ``(members,)``.

    Raises:
        ValueError: The weights do not fit.
    """
    if members < 1:
        raise ValueError("There are no members.")
    given = torch.ones(members) if weights is None else torch.as_tensor(weights).detach()
    given = given.cpu().double()
    if given.shape != (members,):
        raise ValueError(f"Weights of shape {tuple(given.shape)} do not fit {members} members: one for each.")
    if not torch.isfinite(given).all():
        raise ValueError(f"The weight of {member_name(int((~given.isfinite()).nonzero()[0]))} is not finite.")
    if (given < 0).any():
        raise ValueError(f"The weight of {member_name(int(given.argmin()))} is below 0: {float(given.min()):g}.")
    if not given.sum() > 0:
        raise ValueError("All weights are 0.")
    given = given / given.sum()
    return given if like is None else given.to(device=like.device, dtype=working_type(like))


def working_type(tensor: Tensor) -> torch.dtype:
    """The precision to work in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
