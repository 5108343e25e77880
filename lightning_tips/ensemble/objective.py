"""What the weights of an ensemble are judged by, as a function of the weights alone.

A vote mixes the probabilities of the members linearly, so of each prediction only the probability of what was true
matters: (M, N, C) becomes (M, N). Everything here is float64 on the CPU, which for M members and N samples is small.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tips.ensemble.checks import Task, check_choice, check_outputs, check_targets, member_name
from lightning_tips.ensemble.simplex import minimise_quadratic

__all__ = ["MixtureLikelihood", "Objective", "SquaredError", "build_objective"]

LOWEST = torch.finfo(torch.float32).tiny
"""A probability of 0 counts as this, the smallest that float32 holds in full: one lost sample costs 87 nats."""


class Objective(ABC):
    """A convex loss of mixed predictions, over the samples of a split.

    Attributes:
        values: ``(M, N, K)`` float64, what is mixed linearly: K numbers for each sample.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @property
    def members(self) -> int:
        """M."""
        return self.values.shape[0]

    @property
    def samples(self) -> int:
        """N."""
        return self.values.shape[1]

    @abstractmethod
    def subset(self, rows: Tensor) -> Objective:
        """The same for the samples at these indices, or of this mask."""

    @abstractmethod
    def losses(self, weights: Tensor) -> Tensor:
        """The loss of each sample ``(N,)`` for weights ``(M,)`` that sum to 1."""

    @abstractmethod
    def losses_with_one_more(self, counts: Tensor) -> Tensor:
        """The mean losses ``(M,)`` when each of the members in turn joins those counted in ``counts`` ``(M,)``."""

    @abstractmethod
    def fit(self, tolerance: float) -> Tensor:
        """The weights ``(M,)`` on the simplex with a mean loss within ``tolerance`` of the lowest."""

    def loss(self, weights: Tensor) -> float:
        """The mean loss."""
        return float(self.losses(weights).mean())


class MixtureLikelihood(Objective):
    """Negative log-likelihood of a mixture, ``-log(weights @ likelihoods)``, in nats.

    Args:
        log_likelihoods: ``(M, N, K)`` float64, of what was true.
    """

    def __init__(self, log_likelihoods: Tensor) -> None:
        # The likeliest member of each sample is at 1: densities far from 1 neither vanish nor overflow.
        self._log_likelihoods = log_likelihoods
        self._offset = log_likelihoods.amax(0)
        super().__init__((log_likelihoods - self._offset).exp().clamp_min(LOWEST))

    def subset(self, rows: Tensor) -> MixtureLikelihood:
        """The same for some of the samples."""
        return MixtureLikelihood(self._log_likelihoods[:, rows])

    def losses(self, weights: Tensor) -> Tensor:
        """The loss of each sample."""
        mixed = torch.tensordot(weights, self.values, 1)
        return -(mixed.log() + self._offset).mean(1)

    def losses_with_one_more(self, counts: Tensor) -> Tensor:
        """The mean losses with each member in turn."""
        mixed = (torch.tensordot(counts, self.values, 1) + self.values).div_(float(counts.sum()) + 1.0)
        return -(mixed.log_().mean((1, 2)) + self._offset.mean())

    def fit(self, tolerance: float) -> Tensor:
        """Newton's method on the simplex, each step a quadratic problem there.

        With ``d`` the mean ratios of the members' likelihoods to the mixture's, no weights have a loss below that of
        these by more than ``log(max(d))`` (Cover 1984, IEEE Trans. Inf. Theory 30): that is what ``tolerance`` bounds.
        The update ``w * d`` of expectation maximisation descends too, but needs thousands of steps for what this does
        in ten.
        """
        values = self.values.flatten(1)
        size = values.shape[1]
        weights = torch.full((self.members,), 1.0 / self.members, dtype=torch.float64)
        loss = -(weights @ values).log().mean()
        for _ in range(200):
            ratios = values / (weights @ values)
            slope = ratios.mean(1)  # of the loss it is -slope
            if float(slope.max().log()) <= tolerance:
                break
            curvature = ratios @ ratios.T / size
            # Since curvature @ weights == slope, the second order model is w @ curvature @ w / 2 - 2 * slope @ w.
            target = minimise_quadratic(curvature / 2 - slope[:, None] - slope[None, :])
            direction = target - weights
            descent = float(slope @ direction)
            step, moved = 1.0, False
            while step > 1e-10 and not moved:
                there = weights + step * direction
                new_loss = -(there @ values).log().mean()
                moved = bool(new_loss <= loss - 1e-4 * step * descent) and descent > 0
                step /= 2
            if not moved:
                break  # as near as float64 comes
            weights, loss = there.clamp_min(0.0), new_loss
            weights /= weights.sum()
        return weights


class SquaredError(Objective):
    """Squared error of a weighted mean, over all numbers of a sample.

    Args:
        errors: ``(M, N, K)`` float64, prediction minus target.
    """

    def __init__(self, errors: Tensor) -> None:
        super().__init__(errors)
        flat = errors.flatten(1)
        self._products = flat @ flat.T / flat.shape[1]

    def subset(self, rows: Tensor) -> SquaredError:
        """The same for some of the samples."""
        return SquaredError(self.values[:, rows])

    def losses(self, weights: Tensor) -> Tensor:
        """The loss of each sample."""
        # As weights sum to 1, the error of the mean is the mean of the errors.
        return torch.tensordot(weights, self.values, 1).square().mean(1)

    def losses_with_one_more(self, counts: Tensor) -> Tensor:
        """The mean losses with each member in turn."""
        with_others = self._products @ counts
        return (counts @ with_others + 2 * with_others + self._products.diagonal()) / (counts.sum() + 1).square()

    def fit(self, tolerance: float) -> Tensor:
        """Exact: a quadratic problem on the simplex."""
        return minimise_quadratic(self._products)


def build_objective(
    outputs: Tensor,
    targets: Tensor,
    task: Task = "multiclass",
    variances: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Objective:
    """Checks the outputs of members on a split and makes the loss of their weights of it.

    Args:
        outputs: ``(M, N, C, ...)``, ``(M, N, C)`` or ``(M, N, ...)``, see
            :func:`~lightning_tips.ensemble.ensemble_weights`.
        targets: What was true.
        task: What the outputs are.
        variances: Of each member's prediction, for ``"regression"`` only.
        names: Of the members, for errors.

    Raises:
        TypeError: A type that does not fit.
        ValueError: Shapes or values that do not fit.
    """
    needed = 2 if task == "regression" else 3
    if outputs.ndim < needed:
        raise ValueError(
            f"Outputs are stacked over the members, with {needed} dimensions or more, not {tuple(outputs.shape)}."
        )
    if not outputs.shape[0]:
        raise ValueError("There are no members.")
    if names is not None and len(names) != len(outputs):
        raise ValueError(f"{len(names)} names do not fit {len(outputs)} members.")
    if variances is not None and task != "regression":
        raise ValueError(f"Variances belong to task='regression', not {task!r}.")
    check_choice("task", task, Task)
    for member, output in enumerate(outputs):
        check_outputs(output, task, member_name(member, names))
    check_targets(targets, outputs.shape[1:], task)

    outputs, targets = outputs.detach(), targets.detach().to(outputs.device)
    if task == "multiclass":
        index = targets.long()[None, :, None].expand(len(outputs), -1, 1, *targets.shape[1:])
        return MixtureLikelihood(_log(outputs.gather(2, index)))
    if task == "multilabel":
        return MixtureLikelihood(_log(torch.where(targets.bool(), outputs, 1 - outputs)))
    errors = _rows(outputs) - _rows(targets[None])
    if variances is None:
        return SquaredError(errors)
    _check_variances(variances, outputs, names)
    spread = _rows(variances)
    return MixtureLikelihood(-0.5 * (errors.square() / spread + spread.log() + math.log(2 * math.pi)))


def _rows(stacked: Tensor) -> Tensor:
    """(M, N, ...) as (M, N, K), float64 on the CPU. In this order: not every device has float64."""
    return stacked.detach().cpu().double().reshape(*stacked.shape[:2], -1)


def _log(probabilities: Tensor) -> Tensor:
    return _rows(probabilities).clamp_min(LOWEST).log()


def _check_variances(variances: Tensor, outputs: Tensor, names: Sequence[str] | None) -> None:
    if variances.shape != outputs.shape:
        raise ValueError(f"Variances of shape {tuple(variances.shape)} do not fit means of {tuple(outputs.shape)}.")
    for index, variance in enumerate(variances):
        if not bool(((variance > 0) & torch.isfinite(variance)).all()):
            raise ValueError(f"{member_name(index, names)} yields variances that are not above 0 and finite.")
