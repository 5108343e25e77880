"""What members predicted on a split: the weights and the temperature that suit it, and honest scores of the vote.

Pure functions; all numbers are Python's, so that rank 0 can tell them to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_tips.ensemble.calibration import apply_temperature, calibration_error, fit_temperature
from lightning_tips.ensemble.checks import Task
from lightning_tips.ensemble.vote import Voting, decide, vote, votes_of
from lightning_tips.ensemble.weights import Method, cross_fit, ensemble_weights

__all__ = ["Combined", "align_targets", "combine", "fit_vote", "other_class_order", "scores", "whole_split"]

LOWEST = torch.finfo(torch.float32).tiny


class Combined(NamedTuple):
    """What a vote says.

    Attributes:
        probabilities: ``(N, C, ...)``, at the temperature; of hard votes the shares; in regression numbers.
        prediction: ``(N, ...)`` classes, ``(N, C)`` labels, or the numbers. Ties of hard votes go to what is likelier.
    """

    probabilities: Tensor
    prediction: Tensor


def combine(members: Tensor, weights: Tensor, temperature: float, voting: Voting, task: Task) -> Combined:
    """The vote of members that have been stacked.

    Args:
        members: ``(M, N, C, ...)``.
        weights: ``(M,)``, or ``(M, N)`` where each sample has its own.
        temperature: Of soft and weighted votes.
        voting: How they vote.
        task: What they predict.
    """
    if weights.ndim == 2:
        shares = weights.to(members).reshape(*weights.shape, *([1] * (members.ndim - 2)))
        mixed = (members * shares).sum(0)
        if voting == "hard":
            votes = sum(votes_of(member, task) * share for member, share in zip(members, shares, strict=True))
            assert isinstance(votes, Tensor)
            return Combined(votes, decide(votes, mixed, task))
    elif task == "regression":
        mixed = torch.tensordot(weights.to(members), members, dims=1)
    else:
        result = vote(members, None if voting == "soft" else weights, voting, task=task)
        if voting == "hard":
            return Combined(result.probabilities, result.prediction)
        mixed = result.probabilities
    if task == "regression":
        return Combined(mixed, mixed)
    prediction = mixed >= 0.5 if task == "multilabel" else mixed.argmax(1)  # which no temperature changes
    return Combined(mixed if temperature == 1.0 else apply_temperature(mixed, temperature, task=task), prediction)


def scores(combined: Combined | Tensor, targets: Tensor, task: Task) -> dict[str, float]:
    """``loss`` (NLL; mean squared error in regression) and, but for regression, ``acc`` and ``ece``.

    Args:
        combined: Of :func:`combine`; or one member's ``(N, C, ...)`` probabilities, or numbers.
        targets: As in :func:`ensemble_weights`.
        task: What is predicted.
    """
    if isinstance(combined, Tensor):
        combined = combine(combined[None], torch.ones(1), 1.0, "weighted", task)
    values = combined.probabilities.double()
    if task == "regression":
        return {"loss": float((values - targets.double()).square().mean())}
    truth = targets.bool() if task == "multilabel" else targets.long()
    right = torch.where(truth, values, 1 - values) if task == "multilabel" else values.gather(1, truth[:, None])[:, 0]
    return {
        "loss": float(-right.clamp_min(LOWEST).log().mean()),
        "acc": float((combined.prediction == truth).double().mean()),
        "ece": calibration_error(combined.probabilities, targets, task=task),
    }


def align_targets(targets: Tensor, shape: Sequence[int], task: Task) -> Tensor:
    """Targets in the shape and type that belong to predictions, where that is a matter of form alone.

    ``(N, 1)`` and ``(N,)`` are the same, and so are 0 and 1 of any type for two classes. Whatever else does not fit
    stays as it is, and is refused where it is used.

    Args:
        targets: As the batch has them.
        shape: Of one member's predictions, ``(N, C, ...)``, or ``(N, ...)`` in regression.
        task: What is predicted.
    """
    expected = (shape[0], *shape[2:]) if task == "multiclass" else tuple(shape)
    if len(targets) == expected[0] and [n for n in targets.shape[1:] if n > 1] == [n for n in expected[1:] if n > 1]:
        targets = targets.reshape(expected)
    if task == "multiclass" and shape[1] == 2 and (targets.is_floating_point() or targets.dtype == torch.bool):
        as_class = targets.long()
        if bool((as_class == targets).all()):
            return as_class
    return targets


def whole_split(
    ranks: Sequence[tuple[Tensor, Tensor] | None], samples: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """A split from the parts that ranks have seen of it.

    Args:
        ranks: Predictions ``(M, n, C, ...)`` and targets ``(n, ...)`` of each rank; None: it has seen none.
        samples: Where ranks take turns, how many samples the split has: those that were repeated so that all ranks have
            the same number are left out, and the order is that of the split. None: all that was seen.

    Returns:
        Predictions ``(M, N, C, ...)`` and targets ``(N, ...)``; None if nobody has seen any.
    """
    there = [(rank, part) for rank, part in enumerate(ranks) if part is not None]
    if not there:
        return None
    members = torch.cat([part[0] for _, part in there], 1)
    targets = torch.cat([part[1] for _, part in there])
    if samples is None:
        return members, targets
    place = torch.cat([torch.arange(len(part[1])) * len(ranks) + rank for rank, part in there])
    order = place.argsort()
    order = order[place[order] < samples]
    return members[:, order], targets[order]


def other_class_order(probabilities: Tensor, targets: Tensor) -> tuple[float, float, list[int]] | None:
    """Whether a member seems to have its classes in another order than the targets.

    Looks for the order in which it would be right most often. More than 0.2 of the samples more is taken for a sign.

    Args:
        probabilities: ``(N, C)`` of one member.
        targets: ``(N,)``.

    Returns:
        Its accuracy, that in the other order, and which class each of its own seems to be; None without a sign.
    """
    classes = probabilities.shape[1]
    pairs = probabilities.argmax(1) * classes + targets.long()
    table = torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    own, there = linear_sum_assignment(table.numpy(), maximize=True)
    now, best = float(table.diagonal().sum()) / len(targets), float(table[own, there].sum()) / len(targets)
    return (now, best, there.tolist()) if best > now + 0.2 else None


def fit_vote(
    members: Tensor,
    targets: Tensor,
    method: Method | Sequence[float],
    voting: Voting = "weighted",
    task: Task = "multiclass",
    calibrate: bool = True,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Weights and temperature for a split that nothing else was fitted on, and what the vote is worth with them.

    Args:
        members: ``(M, N, C, ...)`` predictions.
        targets: Of the N samples.
        method: How to weigh the members, or weights that are given.
        voting: How they vote; a soft vote has no weights.
        task: What they predict.
        calibrate: Whether to fit a temperature too.
        seed: Of the folds.
        names: Of the members, for errors.

    Returns:
        ``weights`` (list of M), ``temperature``, and ``scores`` of the vote, cross-fitted: the weights of each sample
        were fitted without it. Only the temperature, one number, has seen it.

    Raises:
        ValueError: See :func:`ensemble_weights`; an empty split, or fewer than 2 samples.
    """
    count = len(members)
    honest: Tensor | None = None
    if voting == "soft":
        method = "uniform"
    if not isinstance(method, str):
        weights = torch.as_tensor(list(method), dtype=torch.float64)
        weights = weights / weights.sum()
        ensemble_weights(members, targets, "uniform", task=task, names=names)  # the checks
    else:
        weights = ensemble_weights(members, targets, method, task=task, seed=seed, names=names).double()
        if method != "uniform" and count > 1 and not bool((weights == weights[0]).all()):
            inner: Method = "greedy" if method == "best" else method
            folds = cross_fit(members, targets, inner, task=task, seed=seed, names=names)
            honest = folds.weights[folds.fold].T
    judged = weights if honest is None else honest
    temperature = 1.0
    if calibrate and task != "regression" and voting != "hard":
        mixed = combine(members, judged, 1.0, voting, task).probabilities
        temperature = fit_temperature(mixed, targets, task=task)
    found = scores(combine(members, judged, temperature, voting, task), targets, task)
    return {"weights": weights.tolist(), "temperature": temperature, "scores": found}
