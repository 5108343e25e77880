"""One network from several of the same initialisation: the mean of their weights, which costs what one member costs.

Networks of different initialisation have no such mean: what one computes in its third channel another computes in its
ninth, and halfway between them is neither. Those vote.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tips.ensemble.checks import as_weights, member_name

__all__ = ["Barrier", "average_weights", "greedy_soup", "weight_barrier", "weight_cosine"]

State = Mapping[str, Tensor]
Evaluate = Callable[[dict[str, Tensor]], float]

LOW_COSINE = 0.5
"""Below this two members are suspected of different initialisations. See ``benchmarks/ensemble/soup.json``."""

LARGE_BARRIER = 0.1
"""A score halfway that is lower than the mean of the ends by this share of it is a collapse."""


def average_weights(
    states: Sequence[State], weights: Sequence[float] | Tensor | None = None, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The mean of state dicts, entry by entry; floating entries in float32 at least, others are the first one's.

    The means of BatchNorm's running statistics are not those of the mean network. Estimate them again on training data
    before it is used: ``torch.optim.swa_utils.update_bn(loader, network)``.

    Args:
        states: One for each member, with the same names and shapes.
        weights: One for each member, in any unit; None: all the same.
        names: Of the members, for errors.

    Returns:
        New tensors, with the types and devices of the first state dict.

    Raises:
        ValueError: Entries or shapes that differ, NaN, or weights that do not fit.
    """
    _check_states(states, names)
    shares = as_weights(weights, len(states)).tolist()
    mean: dict[str, Tensor] = {}
    for key, first in states[0].items():
        if not first.is_floating_point():
            mean[key] = first.detach().clone()
            continue
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        total = torch.zeros_like(first, dtype=wide)
        for share, state in zip(shares, states, strict=True):
            total.add_(state[key].detach().to(total), alpha=share)
        mean[key] = total.to(first.dtype)
    return mean


def weight_cosine(first: State, second: State) -> float:
    """The cosine similarity of two members' weights: floating entries of 2 dimensions or more, all in one vector.

    Biases and norms are left out: they begin at the same 0 and 1 in every initialisation.

    Raises:
        ValueError: Entries or shapes that differ, or no such weights.
    """
    _check_states([first, second], None)
    keys = [key for key, value in first.items() if value.is_floating_point() and value.ndim >= 2]
    if not keys:
        raise ValueError("There are no weights of 2 dimensions or more to compare.")
    products = [0.0, 0.0, 0.0]
    for key in keys:
        a, b = first[key].detach().float().flatten(), second[key].detach().float().flatten().to(first[key].device)
        for place, product in enumerate((a @ b, a @ a, b @ b)):
            products[place] += float(product)
    return products[0] / max(math.sqrt(products[1] * products[2]), 1e-30)


class Barrier(NamedTuple):
    """What lies between two members.

    Attributes:
        ends: Their scores.
        halfway: The score of the mean of their weights.
        cosine: Of their weights, see :func:`weight_cosine`.
    """

    ends: tuple[float, float]
    halfway: float
    cosine: float

    @property
    def height(self) -> float:
        """How far the score halfway is below the mean of the ends; below 0 where the mean network is better."""
        return sum(self.ends) / 2 - self.halfway


def weight_barrier(first: State, second: State, evaluate: Evaluate) -> Barrier:
    """Scores two members and the network halfway between them (Frankle et al. 2020, arXiv:1912.05671).

    Args:
        first: State dict of one.
        second: Of the other.
        evaluate: See :func:`greedy_soup`.

    Raises:
        ValueError: Entries or shapes that differ.
    """
    cosine = weight_cosine(first, second)
    ends = (float(evaluate(dict(first))), float(evaluate(dict(second))))
    return Barrier(ends, float(evaluate(average_weights([first, second]))), cosine)


def greedy_soup(
    states: Sequence[State], evaluate: Evaluate, *, check: bool = True, names: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], list[int]]:
    """Averages the weights of those members that are better together (Wortsman et al. 2022, arXiv:2203.05482).

    Members are taken in order of their own score; each stays in the mean if the score does not fall. So the result is
    at least as good as the best member, on the data of ``evaluate``.

    Members must come from the same trained weights: fine-tuned from one pretrained network, or forked from one run. No
    state dict tells where it comes from, so it is measured. Weights of which the cosine similarity to the best member's
    is below 0.5 are suspected, and refused if the score halfway is also more than a tenth below the mean of the two.
    Either alone decides nothing: of one initialisation, long training apart ends at a low cosine too, and convex models
    may be averaged wherever they began.

    Args:
        states: State dicts of the members.
        evaluate: From a state dict to a score on held-out data, the higher the better: accuracy, or minus the loss.
            With BatchNorm it must estimate the running statistics again first, ``torch.optim.swa_utils.update_bn``, or
            every mean looks bad; and so must whoever uses the result. Called at most 3 times for each member.
        check: Whether to refuse different initialisations.
        names: Of the members, for errors.

    Returns:
        The mean state dict, and the indices of the members in it, the best one first.

    Raises:
        ValueError: Entries or shapes that differ, a score that is NaN, or members of different initialisations.
    """
    _check_states(states, names)
    scores = [float(evaluate(dict(state))) for state in states]
    for index, score in enumerate(scores):
        if math.isnan(score):
            raise ValueError(f"The score of {member_name(index, names)} is NaN.")
    order = sorted(range(len(states)), key=lambda index: -scores[index])  # stable: of equals the first
    best = order[0]
    if check:
        for other in order[1:]:
            _refuse_other_start(states, best, other, scores, evaluate, names)
    chosen, soup, highest = [best], average_weights([states[best]]), scores[best]
    for index in order[1:]:
        candidate = average_weights([states[i] for i in [*chosen, index]])
        score = float(evaluate(dict(candidate)))
        if score >= highest:
            chosen, soup, highest = [*chosen, index], candidate, score
    return soup, chosen


def _refuse_other_start(
    states: Sequence[State],
    best: int,
    other: int,
    scores: Sequence[float],
    evaluate: Evaluate,
    names: Sequence[str] | None,
) -> None:
    cosine = weight_cosine(states[best], states[other])
    if cosine >= LOW_COSINE:
        return
    halfway = float(evaluate(average_weights([states[best], states[other]])))
    mean = (scores[best] + scores[other]) / 2
    if halfway >= mean - LARGE_BARRIER * abs(mean):  # False for NaN
        return
    raise ValueError(
        f"{member_name(best, names)} and {member_name(other, names)} do not seem to come from the same initialisation:"
        f" the cosine similarity of their weights is {cosine:.2f}, and halfway between them the score is {halfway:.4g}"
        f" against {scores[best]:.4g} and {scores[other]:.4g}. The weights of such networks have no useful mean; let"
        " them vote. If they do come from the same one, let `evaluate` estimate BatchNorm again, or pass check=False."
    )


def _check_states(states: Sequence[State], names: Sequence[str] | None) -> None:
    if not states:
        raise ValueError("There are no members.")
    if names is not None and len(names) != len(states):
        raise ValueError(f"{len(names)} names do not fit {len(states)} members.")
    first = states[0]
    for index, state in enumerate(states):
        member = member_name(index, names)
        if state.keys() != first.keys():
            differ = sorted(state.keys() ^ first.keys())
            raise ValueError(
                f"{member} has other entries than {member_name(0, names)}, such as {differ[0]!r}: only networks of the"
                " same architecture have a mean."
            )
        for key, value in state.items():
            if value.shape != first[key].shape:
                raise ValueError(
                    f"{key!r} of {member} has the shape {tuple(value.shape)}, of {member_name(0, names)}"
                    f" {tuple(first[key].shape)}: only networks of the same shape have a mean."
                )
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{key!r} of {member} has entries that are not finite.")
