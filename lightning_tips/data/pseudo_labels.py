"""Which unlabelled samples get a pseudo-label, and what each counts for. Pure functions on probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["PseudoLabels", "as_probabilities", "choose_pseudo_labels"]

Outputs = Literal["auto", "logits", "probabilities"]


class PseudoLabels(NamedTuple):
    """Samples that have got a label.

    Attributes:
        indices: (M,) int64, their places among all samples, ascending.
        labels: (M,) int64 class ids.
        weights: (M,) float32, how much each counts; the mean is 1.
    """

    indices: Tensor
    labels: Tensor
    weights: Tensor


def choose_pseudo_labels(
    probabilities: Tensor,
    threshold: float | Sequence[float] | Tensor = 0.9,
    top_share: float = 1.0,
    per_class: int | None = None,
    prior: Sequence[float] | Tensor | None = None,
    align: bool = False,
    max_weight: float = 4.0,
) -> PseudoLabels:
    """Labels the samples that a teacher is sure of, with classes in balance.

    A sample's label is its most likely class, its confidence that class's probability. Chosen are those at or above the
    threshold (Lee 2013); of each class, if wanted, only the most confident ones (Zou et al. 2018). Left to itself this
    prefers easy classes, more in each round. So the weights give each class its share of ``prior``, as far as
    ``max_weight`` allows.

    Args:
        probabilities: (N, C) floats, each row sums to 1.
        threshold: Lowest confidence, in [0, 1]; or one for each class.
        top_share: Of the samples that are taken for a class only this share, the most confident ones, in (0, 1].
        per_class: And at most so many of a class.
        prior: (C,) share that each class is to have in the weights; not normalised. None: all weights are 1.
        align: Whether confidence and label are taken from ``probabilities * prior / mean(probabilities)``, normalised
            (distribution alignment, Berthelot et al. 2020): for a teacher that prefers some classes. Needs ``prior``.
        max_weight: No sample counts for more than so many times the mean.

    Returns:
        Indices, labels and weights; perhaps none.

    Raises:
        ValueError: If an argument is out of its domain.

    Example:
        >>> probabilities = torch.tensor([[0.95, 0.05], [0.6, 0.4], [0.92, 0.08], [0.01, 0.99]])
        >>> chosen = choose_pseudo_labels(probabilities, 0.9, prior=[0.5, 0.5])
        >>> chosen.indices.tolist(), chosen.labels.tolist(), chosen.weights.tolist()
        ([0, 2, 3], [0, 0, 1], [0.75, 0.75, 1.5])
    """
    values = _checked(probabilities)
    classes = values.shape[1]
    limits = torch.as_tensor(threshold, dtype=torch.float64).reshape(-1)
    if len(limits) not in (1, classes) or not bool(((limits >= 0) & (limits <= 1)).all()):
        raise ValueError(f"threshold={threshold} must be from 0 to 1, or one such for each of {classes} classes.")
    if not 0 < top_share <= 1:
        raise ValueError(f"top_share={top_share} must be above 0 and at most 1.")
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class={per_class} must be at least 1, or None for no limit.")
    if max_weight < 1:
        raise ValueError(f"max_weight={max_weight} must be at least 1: the mean weight is 1.")
    wanted = None if prior is None else _checked_prior(prior, classes)
    if align:
        if wanted is None:
            raise ValueError("align=True needs a prior to align to.")
        values = values * (wanted / values.mean(0).clamp_min(1e-12))
        values = values / values.sum(1, keepdim=True).clamp_min(1e-300)

    confidence, labels = values.max(1)
    limit = limits.expand(classes)[labels]
    # The probabilities were float32: a confidence that equals the threshold is at it.
    chosen = confidence >= limit - 1e-7
    if top_share < 1 or per_class is not None:
        for label in range(classes):
            members = torch.nonzero(labels == label).flatten()
            most = max(1, int(len(members) * top_share + 1e-9))
            most = most if per_class is None else min(most, per_class)
            order = torch.argsort(confidence[members], descending=True, stable=True)
            chosen[members[order[most:]]] = False
    indices = torch.nonzero(chosen).flatten()
    labels = labels[indices]
    return PseudoLabels(indices, labels, _weights(labels, wanted, classes, max_weight))


def _weights(labels: Tensor, prior: Tensor | None, classes: int, max_weight: float) -> Tensor:
    if prior is None or not len(labels):
        return torch.ones(len(labels))
    counts = torch.bincount(labels, minlength=classes).double()
    shares = torch.where(counts > 0, prior, 0.0)
    if not float(shares.sum()):  # the prior knows of none of them
        return torch.ones(len(labels))
    weights = shares / shares.sum() * len(labels) / counts.clamp_min(1)
    for _ in range(50):  # what is cut off a rare class goes to the others, until none is above
        weights = weights.clamp_max(max_weight)
        mean = float((weights * counts).sum() / len(labels))
        if abs(mean - 1) < 1e-9:
            break
        free = (weights < max_weight) & (counts > 0)
        if not bool(free.any()):
            break
        held = float((weights * counts)[~free].sum())
        weights[free] *= (len(labels) - held) / float((weights * counts)[free].sum().clamp_min(1e-12))
    of_samples = weights[labels]
    return (of_samples / of_samples.mean()).float()


def as_probabilities(outputs: Any, kind: Outputs = "auto") -> Tensor:
    """Probabilities from what a network returns.

    Args:
        outputs: A tensor (N, C), or (N,) or (N, 1) for two classes; or a mapping or object that has it as ``logits`` or
            ``probabilities``.
        kind: ``"logits"``, ``"probabilities"``; ``"auto"``: probabilities if no value is negative and each row sums to
            1, else logits. Logarithms of probabilities are logits too. A single value is a logit unless it is said.

    Returns:
        (N, C) float32.

    Raises:
        TypeError: If there is no tensor.
        ValueError: If it has another shape, or values that are not finite.
    """
    if not isinstance(outputs, Tensor):
        for name in ("logits", "probabilities"):
            found = outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)
            if isinstance(found, Tensor):
                return as_probabilities(found, "probabilities" if name == "probabilities" else kind)
        raise TypeError(
            f"The teacher returns {type(outputs).__name__} where logits or probabilities were expected as a tensor."
            " Wrap it in a module whose forward returns them."
        )
    values = outputs.detach().float()
    if values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1):
        values = values.reshape(-1, 1)
        positive = values if kind == "probabilities" else values.sigmoid()
        return torch.cat([1 - positive, positive], 1)
    if values.ndim != 2:
        raise ValueError(
            f"The teacher's outputs have the shape {tuple(values.shape)}; (N, C) is needed, one row a sample:"
            " pseudo-labels are for one class a sample."
        )
    if not bool(torch.isfinite(values).all() if kind != "logits" else ~torch.isnan(values).any()):
        raise ValueError("The teacher's outputs are not finite: it has diverged, or its inputs have holes.")
    sums_to_one = bool((values >= 0).all()) and bool(((values.sum(1) - 1).abs() < 1e-3).all())
    if kind == "probabilities" or (kind == "auto" and sums_to_one):
        return values
    return values.softmax(1)


def _checked(probabilities: Tensor) -> Tensor:
    values = torch.as_tensor(probabilities).detach().cpu().double()
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"probabilities of the shape {tuple(values.shape)} must be (N, C), of at least 2 classes.")
    if len(values) and (bool((values < 0).any()) or not bool(((values.sum(1) - 1).abs() < 1e-2).all())):
        raise ValueError("probabilities must be 0 or more and sum to 1 in each row; apply softmax to logits first.")
    return values


def _checked_prior(prior: Any, classes: int) -> Tensor:
    shares = torch.as_tensor(prior, dtype=torch.float64).reshape(-1)
    if len(shares) != classes or not bool((shares >= 0).all()) or not float(shares.sum()) > 0:
        raise ValueError(f"prior={prior} must hold a share of 0 or more for each of {classes} classes.")
    return shares / shares.sum()
