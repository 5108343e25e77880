"""Weights for the classes of a loss, from how often each class occurs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_tips.core import did_you_mean

__all__ = ["Scheme", "class_weights", "dict_to_list", "scale_to_mean_one"]

Scheme = Literal["inverse", "sqrt", "effective", "none"]


def class_weights(counts: Sequence[float] | Tensor, scheme: Scheme = "inverse", beta: float = 0.999) -> Tensor:
    """Weights of the classes in a loss, with mean 1 over the samples.

    With n_c samples of class c the weight is proportional to

    * ``"inverse"``: 1 / n_c, so that every class counts the same in sum;
    * ``"sqrt"``: 1 / sqrt(n_c), halfway there on a logarithmic scale;
    * ``"effective"``: (1 - beta) / (1 - beta**n_c), the inverse of the effective number of samples
      (Cui et al. 2019, arXiv:1901.05555): samples of a class overlap, so the n-th adds less than the first;
    * ``"none"``: 1.

    A mean of 1 over the samples keeps the loss, and with it the right learning rate, at the scale that it had. To
    keep the ratios too, use the weights with :func:`~lightning_tips.imbalance.weighted_cross_entropy` and its
    siblings: torch's ``cross_entropy(weight=...)`` divides by the weights of the batch.

    Args:
        counts: Number of samples of each class, two classes or more, none of them empty. NumPy arrays will do.
        scheme: See above.
        beta: For ``"effective"``, in [0, 1): 0 gives equal weights, towards 1 it becomes ``"inverse"``.

    Returns:
        Weights ``(C,)`` in float32.

    Raises:
        ValueError: If counts, scheme or beta are none of these.

    Example:
        >>> class_weights([1000, 50])
        tensor([ 0.5250, 10.5000])
        >>> class_weights([900, 100], scheme="sqrt")
        tensor([0.8333, 2.5000])
    """
    if scheme not in get_args(Scheme):
        raise ValueError(
            f"There is no scheme {scheme!r} of class weights. {did_you_mean(str(scheme), get_args(Scheme))}"
        )
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta must lie in [0, 1), not {beta}.")
    numbers = check_counts(counts)
    if scheme == "inverse":
        raw = 1.0 / numbers
    elif scheme == "sqrt":
        raw = numbers.rsqrt()
    elif scheme == "effective" and beta > 0.0:
        raw = -1.0 / torch.expm1(numbers * math.log(beta))  # the factor 1 - beta drops out below
    else:
        raw = torch.ones_like(numbers)
    return scale_to_mean_one(raw, numbers)


def scale_to_mean_one(weights: Tensor, counts: Tensor) -> Tensor:
    """The same ratios, in float32, with mean 1 over samples of which ``counts`` belong to each class."""
    weights, counts = weights.double(), counts.double()
    return (weights * (counts.sum() / (weights * counts).sum())).float()


def check_counts(counts: Sequence[float] | Tensor) -> Tensor:
    """The counts in float64.

    Raises:
        ValueError: Unless these are the counts of two or more classes, none of them empty.
    """
    numbers = torch.as_tensor(counts).detach().double().cpu()
    if numbers.ndim != 1:
        raise ValueError(f"Counts must be one number for each class, not of shape {tuple(numbers.shape)}.")
    if len(numbers) < 2:
        raise ValueError(f"There is nothing to balance with {len(numbers)} class; counts must be of two or more.")
    if not torch.isfinite(numbers).all() or (numbers < 0).any():
        raise ValueError(f"Counts must be finite and not negative, got {numbers.tolist()}.")
    if empty := (numbers == 0).nonzero().flatten().tolist():
        raise ValueError(
            f"No samples of class {', '.join(map(str, empty))}: its weight would be infinite. Leave the class out, add"
            " samples, or give the weights yourself as a list."
        )
    return numbers


def dict_to_list(weights: Mapping[int | str, float], number: int, names: Sequence[str] = ()) -> list[float]:
    """Weights by class index or name as a list; 1 for classes that are left out.

    Args:
        weights: By index, by the digits of an index (as json writes keys), or by name.
        number: Of classes in the training data, 0 if it is not known. Without names there may be more of them, which
            have no samples: up to the highest index.
        names: Of the classes, if they have any.

    Raises:
        ValueError: If there is no class of that index or name.
    """
    by_index: dict[int, float] = {}
    for key, weight in weights.items():
        if isinstance(key, str) and key in names:
            index = list(names).index(key)
        elif isinstance(key, int) or key.isdigit():
            index = int(key)
        else:
            raise ValueError(
                f"There is no class {key!r}. {did_you_mean(key, names)}"
                if names
                else f"The training data has no names of classes (`classes`), so {key!r} is unknown. Use indices."
            )
        if index < 0 or (names and index >= len(names)):
            last = (len(names) or number) - 1
            raise ValueError(f"There is no class {index}: the training data has classes 0 to {last}.")
        by_index[index] = float(weight)
    return [by_index.get(index, 1.0) for index in range(max(number, len(names), *(index + 1 for index in by_index)))]
