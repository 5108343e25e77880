"""Probabilities after balanced training: back to the share of the classes in the world, and where to decide.

Training with class weights or a balancing sampler teaches a network the prior of the balanced data, so a rare class
gets too much probability. Bayes' rule takes that back by a shift of the logits; one more number, fitted on validation
data, takes up what the network is overconfident or off by (the shift alone trusts its logits as they are).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_tips.core import did_you_mean
from lightning_tips.imbalance.logit_adjustment import shift_logits
from lightning_tips.imbalance.weights import check_counts

__all__ = ["PriorCorrection", "Threshold", "best_threshold", "correct_prior", "fit_prior_correction", "weighted_prior"]

Prior = Sequence[float] | Tensor
Fitted = Literal["scale", "shift"]
Metric = Literal["balanced_accuracy", "f1"]


def weighted_prior(counts: Prior, weights: Prior) -> Tensor:
    """The prior that a loss with these class weights teaches: the share of each class in the sum of all weights.

    Example:
        >>> weighted_prior([1000, 50], [1.0, 20.0])
        tensor([0.5000, 0.5000])
    """
    mass = check_counts(counts) * torch.as_tensor(weights).double().cpu()
    return (mass / mass.sum()).float()


def correct_prior(
    logits: Tensor, trained_prior: Prior, true_prior: Prior, scale: float = 1.0, strength: float = 1.0
) -> Tensor:
    """Logits for data with another prior than that of training: ``scale * logits + strength * log(true / trained)``.

    Args:
        logits: ``(N, C, ...)``; with two classes also one logit for the second, ``(N,)`` or ``(N, 1)``.
        trained_prior: Shares or counts of the classes ``(C,)`` as the loss saw them, see :func:`weighted_prior`.
        true_prior: Those of the data that predictions are made for.
        scale: Below 1 for an overconfident network; see :func:`fit_prior_correction`.
        strength: Share of the shift.

    Returns:
        Logits of the same shape.

    Raises:
        ValueError: If a class is empty or shapes do not match.
    """
    return shift_logits(logits * scale, strength * _log_ratio(trained_prior, true_prior))


@dataclass(frozen=True)
class PriorCorrection:
    """A fitted correction: call it on logits.

    Attributes:
        shift: ``log(true / trained)`` for each class.
        scale: Factor of the logits.
        strength: Factor of the shift.
        nll_before: Mean negative log-likelihood of the validation data, uncorrected.
        nll: The same, corrected.
    """

    shift: tuple[float, ...]
    scale: float
    strength: float
    nll_before: float
    nll: float

    def __call__(self, logits: Tensor) -> Tensor:
        """The corrected logits."""
        return shift_logits(logits * self.scale, self.strength * torch.tensor(self.shift))


def fit_prior_correction(
    logits: Tensor, targets: Tensor, trained_prior: Prior, true_prior: Prior, fitted: Fitted = "shift"
) -> PriorCorrection:
    """Fits the one free number of :func:`correct_prior` by the likelihood of validation data.

    Both fits are convex, so there is one best value. ``"shift"`` fits the strength of the shift; with two classes the
    mean predicted probability then is exactly the share of the class in the validation data (if the two priors differ:
    otherwise there is no shift to fit). ``"scale"`` takes care of
    overconfidence, but the mean can stay off: in our tests by 45 % for a network that had learned its training data
    by heart.

    Args:
        logits: ``(N, C)``, or ``(N,)`` and ``(N, 1)`` with two classes; of data with the true prior.
        targets: Class indices ``(N,)``.
        trained_prior: As in :func:`correct_prior`.
        true_prior: As in :func:`correct_prior`.
        fitted: Which number is fitted; the other stays 1.

    Raises:
        ValueError: If shapes do not match, logits are not finite, or ``fitted`` is unknown.
    """
    if fitted not in get_args(Fitted):
        raise ValueError(f"Cannot fit {fitted!r}. {did_you_mean(str(fitted), get_args(Fitted))}")
    shift = _log_ratio(trained_prior, true_prior)
    values, classes = logits.detach().double().cpu(), targets.detach().cpu().long().flatten()
    if values.ndim < 2 or (values.ndim == 2 and values.shape[1] == 1 and len(shift) == 2):
        values = torch.stack([torch.zeros_like(values.flatten()), values.flatten()], 1)
    if values.shape != (len(classes), len(shift)) or not len(classes):
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)}, targets of shape {tuple(targets.shape)} and {len(shift)} classes"
            " do not belong together."
        )
    if not torch.isfinite(values).all():
        raise ValueError("Some logits are not finite.")

    rows = torch.arange(len(classes))

    def nll(scale: float, strength: float) -> float:
        return float(-(scale * values + strength * shift).log_softmax(1)[rows, classes].mean())

    def slope(scale: float, strength: float) -> float:
        probabilities = (scale * values + strength * shift).softmax(1)
        probabilities[rows, classes] -= 1.0
        return float((probabilities * (values if fitted == "scale" else shift)).sum(1).mean())

    scale = strength = 1.0
    if fitted == "scale":
        scale = _root(lambda x: slope(x, 1.0), 0.0, 100.0)
    elif bool((shift - shift.mean()).abs().max() > 1e-9):  # equal priors: there is no shift to fit
        strength = _root(lambda x: slope(1.0, x), -100.0, 100.0)
    return PriorCorrection(tuple(shift.tolist()), scale, strength, nll(1.0, 0.0), nll(scale, strength))


class Threshold(NamedTuple):
    """Where to decide for the second class, ``score >= value``, and what that gives on the data it was chosen on."""

    value: float
    score: float


def best_threshold(scores: Tensor, targets: Tensor, metric: Metric = "balanced_accuracy") -> Threshold:
    """The threshold for a binary problem that is best on validation data.

    Args:
        scores: Probabilities or logits of the second class, ``(N,)`` or ``(N, 1)``.
        targets: 0 and 1, both present.
        metric: ``"balanced_accuracy"``, the mean recall of the two classes, or ``"f1"`` of the second.

    Returns:
        The threshold, halfway between two scores, and the metric there. Of equally good ones it is the highest.

    Raises:
        ValueError: If one class is missing, shapes differ, a score is NaN, or the metric is unknown.

    Example:
        >>> best_threshold(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 1]))
        Threshold(value=2.5, score=1.0)
    """
    if metric not in get_args(Metric):
        raise ValueError(f"There is no metric {metric!r}. {did_you_mean(str(metric), get_args(Metric))}")
    values, truth = scores.detach().double().cpu().flatten(), targets.detach().double().cpu().flatten()
    if len(values) != len(truth) or not ((truth == 0) | (truth == 1)).all():
        raise ValueError(f"Expected {len(values)} targets of 0 and 1, got shape {tuple(targets.shape)}.")
    if values.isnan().any():
        raise ValueError("Some scores are NaN.")
    positives = truth.sum()
    if not 0 < positives < len(truth):
        raise ValueError("A threshold needs samples of both classes to be chosen by.")
    values, order = values.sort(descending=True)
    true_positives = truth[order].cumsum(0)
    flagged = torch.arange(1, len(values) + 1).double()
    if metric == "f1":
        quality = 2 * true_positives / (flagged + positives)
    else:
        false_positives = flagged - true_positives
        quality = (true_positives / positives + 1 - false_positives / (len(truth) - positives)) / 2
    # Equal scores fall on one side together: only the last of them is a place to cut.
    quality[:-1][values[:-1] == values[1:]] = -1.0
    cut = int(quality.argmax())
    below = values[cut + 1] if cut + 1 < len(values) else values[cut]
    return Threshold(float((values[cut] + below) / 2), float(quality[cut]))


def _log_ratio(trained: Prior, true: Prior) -> Tensor:
    before, after = check_counts(trained), check_counts(true)
    if len(before) != len(after):
        raise ValueError(f"The trained prior has {len(before)} classes, the true one {len(after)}.")
    return (after / after.sum()).log() - (before / before.sum()).log()


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function changes sign, or the end of the interval that is nearer to it."""
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < 0.0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
