"""The vote: one prediction from those of several members, and how much they agree.

Members come one after the other (:class:`Vote`, :class:`RegressionVote`), of which only sums are kept, or all at once
(:func:`vote`, :func:`vote_regression`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_tips.ensemble.checks import (
    Task,
    as_weights,
    check_choice,
    check_outputs,
    member_name,
    working_type,
)

__all__ = [
    "RegressionResult",
    "RegressionVote",
    "Vote",
    "VoteResult",
    "Voting",
    "decide",
    "vote",
    "vote_regression",
    "votes_of",
]

Voting = Literal["soft", "hard", "weighted"]
TIE = 1e-5
"""Shares of votes that are nearer than this are equal: weights are rounded when they are summed."""


class VoteResult(NamedTuple):
    """What an ensemble says. All of it is on the members' device; floats are float64 if theirs are, else float32.

    Attributes:
        prediction: ``(N, ...)`` int64, the class; for labels ``(N, C)`` bool. By hard votes if voting is hard, where
            the probabilities decide ties; else by the probabilities.
        probabilities: ``(N, C, ...)``: mean of the members' probabilities; if voting is hard, the shares of the votes.
        votes: ``(N, C, ...)``: share of the members' votes for each class, each member's vote counting its weight; for
            labels the share of those with a probability of at least 0.5.
        entropy: ``(N, ...)`` nats: entropy of the mean of the probabilities, whatever the voting. For labels
            ``(N, C)``, of each label by itself. High where nobody knows.
        disagreement: The same shape: ``entropy`` minus the mean of the members' entropies, which is the mutual
            information of prediction and member (BALD; Houlsby et al. 2011, arXiv:1112.5745). 0 where all members say
            the same, at most the entropy of the weights. High where it depends on whom one asks.
    """

    prediction: Tensor
    probabilities: Tensor
    votes: Tensor
    entropy: Tensor
    disagreement: Tensor


class Vote:
    """Members' probabilities go in one after the other; nothing is kept but sums over them.

    Args:
        voting: ``"soft"``: mean of the probabilities, all members the same; ``"weighted"``: each by its weight;
            ``"hard"``: each member votes for its likeliest class, with its weight if it is given one.
        task: ``"multiclass"``, probabilities ``(N, C, ...)``; or ``"multilabel"``, ``(N, C)`` of labels.
        check: Look at the values: NaN, logits, negative ones. That waits for the device once a member.

    Raises:
        ValueError: An unknown voting or task.

    Example:
        >>> votes = Vote("weighted")
        >>> votes.add(torch.tensor([[0.9, 0.1]]), weight=3.0)
        >>> votes.add(torch.tensor([[0.5, 0.5]]), weight=1.0)
        >>> votes.result().probabilities
        tensor([[0.8000, 0.2000]])
    """

    def __init__(self, voting: Voting = "soft", task: Task = "multiclass", check: bool = True) -> None:
        check_choice("voting", voting, Voting)
        check_choice("task", task, Literal["multiclass", "multilabel"])
        self.voting = voting
        self.task = task
        self.check = check
        self.members = 0
        self._weight = 0.0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None  # of probabilities, votes, entropies

    @torch.no_grad()
    def add(self, probabilities: Tensor, weight: float | None = None, name: str | None = None) -> None:
        """Counts a member in.

        Args:
            probabilities: ``(N, C, ...)``, any floating type; sums are float32 or more.
            weight: At least 0, in any unit: what counts is its share. Not for soft voting, required for weighted.
            name: What errors call the member; None: its number.

        Raises:
            TypeError: Not floating point.
            ValueError: The values or the shape do not fit, or the weight.
        """
        member = name or member_name(self.members)
        _check_weight(weight, self.voting, member)
        _check_like(self._sums and self._sums[0], probabilities, member)
        if self.check:
            check_outputs(probabilities, self.task, member)
        factor = 1.0 if weight is None else float(weight)
        values = probabilities.detach().to(working_type(probabilities))
        parts = (values, votes_of(values, self.task), _entropy(values, self.task))
        if self._sums is None:
            self._sums = tuple(part * factor for part in parts)  # type: ignore[assignment]
        else:
            for total, part in zip(self._sums, parts, strict=True):
                total.add_(part, alpha=factor)
        self.members += 1
        self._weight += factor

    def result(self) -> VoteResult:
        """What the members that were added say together; more can be added after it.

        Raises:
            ValueError: No member was added, or all weights are 0.
        """
        if self._sums is None:
            raise ValueError("Nobody has voted: add members first.")
        if self._weight <= 0:
            raise ValueError("All weights are 0.")
        mean, votes, within = (total / self._weight for total in self._sums)
        entropy = _entropy(mean, self.task)
        disagreement = (entropy - within).clamp_min(0.0)  # it is never below 0, but for rounding
        if self.voting == "hard":
            prediction = decide(votes, mean, self.task)
            return VoteResult(prediction, votes, votes, entropy, disagreement)
        prediction = mean >= 0.5 if self.task == "multilabel" else mean.argmax(1)
        return VoteResult(prediction, mean, votes, entropy, disagreement)


def vote(
    probabilities: Tensor | Sequence[Tensor],
    weights: Sequence[float] | Tensor | None = None,
    voting: Voting | None = None,
    *,
    task: Task = "multiclass",
    names: Sequence[str] | None = None,
) -> VoteResult:
    """One prediction from those of several members.

    Args:
        probabilities: ``(M, N, C, ...)``, or one ``(N, C, ...)`` for each member.
        weights: One for each member, in any unit, such as :func:`~lightning_tips.ensemble.ensemble_weights` gives;
            None: all the same.
        voting: See :class:`Vote`; None: ``"weighted"`` if there are weights, else ``"soft"``.
        task: ``"multiclass"`` or ``"multilabel"``; for numbers see :func:`vote_regression`.
        names: Of the members, for errors.

    Raises:
        TypeError: Not floating point.
        ValueError: Values or shapes that do not fit, weights that do not fit, weights for soft voting or none for
            weighted.

    Example:
        >>> members = torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]], [[0.4, 0.6]]])
        >>> vote(members).prediction, vote(members, voting="hard").prediction
        (tensor([0]), tensor([1]))
    """
    voting = voting or ("soft" if weights is None else "weighted")
    _check_members(len(probabilities), names)
    given = None if weights is None else as_weights(weights, len(probabilities)).tolist()
    together = Vote(voting, task)
    for index, member in enumerate(probabilities):
        together.add(member, None if given is None else given[index], member_name(index, names))
    return together.result()


class RegressionResult(NamedTuple):
    """What an ensemble says where members predict numbers. Shapes are the members' ``(N, ...)``.

    Attributes:
        mean: Weighted mean of the members' means.
        variance: Of the mixture of the members: ``within + between``.
        within: Mean of the members' own variances; 0 where they give none.
        between: Variance of the members' means: how much they disagree. As for any weights that sum to 1, it is not
            corrected for the number of members.
    """

    mean: Tensor
    variance: Tensor
    within: Tensor
    between: Tensor


class RegressionVote:
    """Members' means and variances go in one after the other; nothing is kept but sums over them.

    The sums are those of West 1979 (Communications of the ACM 22): the plain sum of squares would lose the variance
    between members that nearly agree about a large number.

    Args:
        check: Look at the values. That waits for the device once a member.
    """

    def __init__(self, check: bool = True) -> None:
        self.check = check
        self.members = 0
        self._weight = 0.0
        self._has_variance = False
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None  # mean; sums of squares about it and of variances

    @torch.no_grad()
    def add(self, mean: Tensor, weight: float | None = None, variance: Tensor | None = None, name: str = "") -> None:
        """Counts a member in.

        Args:
            mean: ``(N, ...)``, any floating type.
            weight: At least 0, in any unit; None: 1.
            variance: Of the member's prediction, the same shape. All members give one, or none.
            name: What errors call the member; none: its number.

        Raises:
            TypeError: Not floating point.
            ValueError: The values, the shape or the weight do not fit, or only some members give a variance.
        """
        member = name or member_name(self.members)
        _check_weight(weight, "hard", member)
        _check_like(self._sums and self._sums[0], mean, member)
        if self.members and self._has_variance != (variance is not None):
            raise ValueError(f"{member} gives {'no' if variance is None else 'a'} variance, unlike those before it.")
        if variance is not None and variance.shape != mean.shape:
            raise ValueError(f"{member} gives a variance of shape {tuple(variance.shape)} to {tuple(mean.shape)}.")
        if self.check:
            check_outputs(mean, "regression", member)
            if variance is not None:
                check_outputs(variance, "regression", f"the variance of {member}")
                if (variance < 0).any():
                    raise ValueError(f"{member} yields a variance below 0.")
        factor = 1.0 if weight is None else float(weight)
        values = mean.detach().to(working_type(mean))
        if self._sums is None:
            self._sums = (values.clone(), torch.zeros_like(values), torch.zeros_like(values))
        center, squares, within = self._sums
        self._weight += factor
        if factor > 0:
            off = values - center
            center.add_(off, alpha=factor / self._weight)
            squares.addcmul_(off, values - center, value=factor)
            if variance is not None:
                within.add_(variance.detach().to(within.dtype), alpha=factor)
        self.members += 1
        self._has_variance = variance is not None

    def result(self) -> RegressionResult:
        """What the members that were added say together; more can be added after it.

        Raises:
            ValueError: No member was added, or all weights are 0.
        """
        if self._sums is None:
            raise ValueError("Nobody has voted: add members first.")
        if self._weight <= 0:
            raise ValueError("All weights are 0.")
        center, squares, within = self._sums
        between, within = (squares / self._weight).clamp_min(0.0), within / self._weight
        return RegressionResult(center.clone(), within + between, within, between)


def vote_regression(
    means: Tensor | Sequence[Tensor],
    variances: Tensor | Sequence[Tensor] | None = None,
    weights: Sequence[float] | Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
) -> RegressionResult:
    """Mean and variance of the mixture of several members (Lakshminarayanan et al. 2017, arXiv:1612.01474, 2.4).

    Args:
        means: ``(M, N, ...)``, or one ``(N, ...)`` for each member.
        variances: The same for the variances, if members predict them.
        weights: One for each member, in any unit; None: all the same.
        names: Of the members, for errors.

    Raises:
        TypeError: Not floating point.
        ValueError: Values, shapes or weights that do not fit.
    """
    _check_members(len(means), names)
    if variances is not None and len(variances) != len(means):
        raise ValueError(f"Variances of {len(variances)} members do not fit means of {len(means)}.")
    given = as_weights(weights, len(means)).tolist()
    together = RegressionVote()
    for index, mean in enumerate(means):
        variance = None if variances is None else variances[index]
        together.add(mean, given[index], variance, member_name(index, names))
    return together.result()


def votes_of(probabilities: Tensor, task: Task) -> Tensor:
    """A member's hard votes, 0 and 1, in the shape of its probabilities ``(N, C, ...)``."""
    if task == "multilabel":
        return (probabilities >= 0.5).to(probabilities.dtype)
    return torch.zeros_like(probabilities).scatter_(1, probabilities.argmax(1, keepdim=True), 1.0)


def _entropy(probabilities: Tensor, task: Task) -> Tensor:
    if task == "multilabel":
        rest = 1 - probabilities
        return -torch.special.xlogy(probabilities, probabilities) - torch.special.xlogy(rest, rest)
    return -torch.special.xlogy(probabilities, probabilities).sum(1)


def decide(votes: Tensor, mean: Tensor, task: Task) -> Tensor:
    """The classes ``(N, ...)``, or labels, by shares of votes; the mean probabilities decide between equals."""
    if task == "multilabel":
        tied = (votes - 0.5).abs() < TIE
        return torch.where(tied, mean >= 0.5, votes > 0.5)
    leading = votes >= votes.amax(1, keepdim=True) - TIE
    return torch.where(leading, mean, -1.0).argmax(1)


def _check_weight(weight: float | None, voting: Voting, member: str) -> None:
    if weight is None:
        if voting == "weighted":
            raise ValueError(f"Weighted voting needs a weight for {member}. Without weights, use voting='soft'.")
        return
    if voting == "soft":
        raise ValueError("Soft voting counts all members the same. With weights, use voting='weighted'.")
    if not 0 <= float(weight) < float("inf"):  # nor NaN
        raise ValueError(f"The weight of {member} must be 0 or more and finite, not {weight}.")


def _check_like(first: Tensor | None, output: Tensor, member: str) -> None:
    if first is not None and output.shape != first.shape:
        raise ValueError(
            f"{member} yields the shape {tuple(output.shape)}, those before it {tuple(first.shape)}: members must have"
            " the same classes, in the same order, and see the same samples."
        )
    if first is not None and output.device != first.device:
        raise ValueError(f"{member} is on {output.device}, those before it on {first.device}.")


def _check_members(members: int, names: Sequence[str] | None) -> None:
    if not members:
        raise ValueError("There are no members.")
    if names is not None and len(names) != members:
        raise ValueError(f"{len(names)} names do not fit {members} members.")
