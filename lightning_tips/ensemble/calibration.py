"""Probabilities that mean what they say: one temperature for the vote, and how to see whether it is right."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from lightning_tips.ensemble.checks import Task, check_choice, check_outputs, check_targets, working_type

__all__ = ["Reliability", "apply_temperature", "calibration_error", "fit_temperature", "reliability"]

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.02, 50.0
GRID = 40  # steps between their logarithms


def fit_temperature(
    probabilities: Tensor,
    targets: Tensor,
    *,
    task: Task = "multiclass",
    from_logits: bool = False,
    prior: float | None = 0.5,
) -> float:
    """The temperature that makes the likelihood of held-out samples highest (Guo et al. 2017, arXiv:1706.04599).

    Logits are divided by it: above 1 it makes predictions less sure, below 1 surer. The mean of several members'
    probabilities is usually less sure than it could be, so an ensemble's is often below 1. Their logits are then the
    logarithms of the mean.

    The likelihood alone falls for luck: where no held-out sample is wrong, as with a hundred samples and an accuracy
    of 99 % it easily happens, it grows towards a temperature of 0, and the first error on new data costs without
    bound. So its logarithm has a normal prior around 0, which counts for less the more samples there are: of thousands
    it changes nothing that could be seen. Platt (1999) smooths targets to the same end.

    Fit it on samples that the members were not trained on, with the weights that the vote will have.

    Args:
        probabilities: ``(N, C, ...)``, for ``"multilabel"`` ``(N, C)``. Of 0 is made 1e-38.
        targets: Class indices ``(N, ...)``, labels ``(N, C)`` of 0 and 1.
        task: ``"multiclass"`` or ``"multilabel"`` (one temperature for all labels).
        from_logits: ``probabilities`` are logits, or log-probabilities of classes.
        prior: Standard deviation of the logarithm of the temperature: 0.5 says that it is between 0.37 and 2.7 in 95 of
            100 cases. ``None``: the likelihood alone.

    Returns:
        The temperature, in [0.02, 50]; 1 where it makes no difference, as all predictions are uniform.

    Raises:
        TypeError: A type that does not fit.
        ValueError: No samples, or values that do not fit.
    """
    _check_task(task)
    check_targets(targets, probabilities.shape, task)
    if prior is not None and not prior > 0:
        raise ValueError(f"prior={prior} must be above 0, or None.")
    logits = _logits(probabilities, task, from_logits).cpu().double()
    targets = targets.detach().cpu()
    if task == "multilabel":
        logits = torch.stack([torch.zeros_like(logits), logits], 1)  # a label is two classes
    rows = logits.movedim(1, -1).flatten(0, -2)
    rows = rows - rows.gather(1, targets.long().reshape(-1, 1))

    if not rows.any():
        return 1.0

    def cost(log_temperature: float) -> float:
        loss = float((rows * math.exp(-log_temperature)).logsumexp(1).mean())
        return loss if prior is None else loss + (log_temperature / prior) ** 2 / (2 * len(rows))

    # With the prior there may be two valleys: the lower one is found on a grid, its floor between the neighbours.
    ends = math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE)
    grid = [ends[0] + (ends[1] - ends[0]) * i / GRID for i in range(GRID + 1)]
    costs = [cost(point) for point in grid]
    lowest = costs.index(min(costs))
    low, high = grid[max(lowest - 1, 0)], grid[min(lowest + 1, GRID)]
    found = minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-7})
    return math.exp(grid[lowest] if costs[lowest] <= found.fun else found.x)


def apply_temperature(
    probabilities: Tensor, temperature: float, *, task: Task = "multiclass", from_logits: bool = False
) -> Tensor:
    """The probabilities at another temperature; which class is likeliest stays the same.

    Args:
        probabilities: ``(N, C, ...)``; differentiable.
        temperature: As :func:`fit_temperature` gives it.
        task: ``"multiclass"`` or ``"multilabel"``.
        from_logits: ``probabilities`` are logits, or log-probabilities of classes.

    Returns:
        Probabilities, the same shape; float64 if these are, else float32.

    Raises:
        ValueError: The temperature is not above 0 and finite, or values do not fit.
    """
    _check_task(task)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"A temperature is above 0 and finite, not {temperature}.")
    logits = _logits(probabilities, task, from_logits) / temperature
    return logits.sigmoid() if task == "multilabel" else logits.softmax(1)


def calibration_error(probabilities: Tensor, targets: Tensor, bins: int = 15, *, task: Task = "multiclass") -> float:
    """The expected calibration error, from 0 to 1: how far confidence and accuracy are apart, over bins of confidence.

    That of torchmetrics: bins of equal width, absolute differences, weighted by the samples in them. For labels it
    compares the probability of each with its share, over all labels together.

    Args:
        probabilities: ``(N, C, ...)``.
        targets: Class indices ``(N, ...)``, labels ``(N, C)``.
        bins: How many.
        task: ``"multiclass"`` or ``"multilabel"``.

    Raises:
        TypeError: A type that does not fit.
        ValueError: No samples, or values that do not fit.
    """
    _check_reliability(probabilities, targets, bins, task)
    values = probabilities.detach().to(working_type(probabilities))
    if task == "multilabel":
        return float(binary_calibration_error(values.flatten(), targets.long().flatten(), n_bins=bins, norm="l1"))
    classes = values.shape[1]
    rows = values.movedim(1, -1).reshape(-1, classes)
    return float(multiclass_calibration_error(rows, targets.long().flatten(), classes, n_bins=bins, norm="l1"))


class Reliability(NamedTuple):
    """Bins of confidence, for a reliability diagram. float64, on the CPU; bins without samples hold NaN.

    Attributes:
        edges: ``(bins + 1,)`` from 0 to 1.
        confidence: ``(bins,)`` mean confidence of the samples of a bin.
        accuracy: ``(bins,)`` share of right predictions among them; for labels the share that have the label.
        counts: ``(bins,)`` int64 samples.
    """

    edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    counts: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error of these bins."""
        gaps = (self.confidence - self.accuracy).abs().nan_to_num(0.0)
        return float((gaps * self.counts).sum() / self.counts.sum())


def reliability(probabilities: Tensor, targets: Tensor, bins: int = 15, *, task: Task = "multiclass") -> Reliability:
    """How often predictions of each confidence are right.

    Args:
        probabilities: ``(N, C, ...)``. The confidence is that of the likeliest class; for labels it is the probability
            of each label.
        targets: Class indices ``(N, ...)``, labels ``(N, C)``.
        bins: Of equal width.
        task: ``"multiclass"`` or ``"multilabel"``.

    Raises:
        TypeError: A type that does not fit.
        ValueError: No samples, or values that do not fit.
    """
    _check_reliability(probabilities, targets, bins, task)
    values, truth = probabilities.detach().cpu().double(), targets.detach().cpu()
    if task == "multilabel":
        confidence, right = values.flatten(), truth.flatten().double()
    else:
        confidence, likeliest = values.max(1)
        confidence, right = confidence.flatten(), (likeliest == truth).flatten().double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    place = (torch.bucketize(confidence.clamp(0, 1), edges, right=True) - 1).clamp_max(bins - 1)
    counts = torch.bincount(place, minlength=bins)
    sums = [torch.bincount(place, weights=of, minlength=bins) / counts for of in (confidence, right)]
    return Reliability(edges, sums[0], sums[1], counts)


def _logits(values: Tensor, task: Task, from_logits: bool) -> Tensor:
    if from_logits:
        check_outputs(values, "regression", "the vote")  # numbers, finite; -inf has no temperature
        return values.to(working_type(values))
    check_outputs(values, task, "the vote")
    values = values.to(working_type(values))
    lowest = torch.finfo(torch.float32).tiny
    logs = values.clamp_min(lowest).log()
    # log1p would not help: near 1, float32 has lost what is left to 1 already.
    return logs - (1 - values).clamp_min(lowest).log() if task == "multilabel" else logs


def _check_task(task: Task) -> None:
    check_choice("task with probabilities", task, Task)
    if task == "regression":
        raise ValueError("Numbers have no temperature and no calibration error: task='multiclass' or 'multilabel'.")


def _check_reliability(probabilities: Tensor, targets: Tensor, bins: int, task: Task) -> None:
    _check_task(task)
    if bins < 1:
        raise ValueError(f"There must be 1 bin or more, not {bins}.")
    check_targets(targets, probabilities.shape, task)
    check_outputs(probabilities, task, "the vote")
