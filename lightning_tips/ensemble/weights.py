"""What weight each member of an ensemble gets, from its predictions on data that nothing else was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_tips.ensemble.checks import Task, as_weights, check_choice, working_type
from lightning_tips.ensemble.objective import Objective, build_objective

__all__ = ["CrossFit", "Method", "cross_fit", "ensemble_weights"]

Method = Literal["best", "uniform", "greedy", "fit"]


def ensemble_weights(
    probabilities: Tensor,
    targets: Tensor,
    method: Method = "best",
    *,
    task: Task = "multiclass",
    variances: Tensor | None = None,
    folds: int = 5,
    seed: int = 0,
    rounds: int = 50,
    bags: int = 1,
    tolerance: float = 1e-6,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Weights of the members of an ensemble, for a weighted mean of their predictions.

    They are judged by the negative log-likelihood (NLL) of that mean; in regression without variances by its squared
    error. Give predictions on a split that neither trained the members nor chose their checkpoints, and never on test
    data.

    * ``"uniform"``: all the same.
    * ``"greedy"``: forward selection with replacement (Caruana et al. 2004, "Ensemble selection from libraries of
      models", ICML). Begins with the best few members, as many as serve best, then adds whichever member helps most,
      again and again; a member's weight is how often it was added. The best of all steps is kept.
    * ``"fit"``: the lowest NLL on the simplex. The problem is convex and solved exactly. Fits a small split too well.
    * ``"best"``: greedy if it beats uniform on samples that it was not fitted on, ``folds`` folds in turn; else
      uniform. Greedy weights are then fitted on all samples.

    Nothing here is random but the folds and bags, which ``seed`` decides. Runs in float64 on the CPU; on a GPU that
    means one copy of ``M * N`` numbers.

    Args:
        probabilities: ``(M, N, C)`` for M members and N samples, or ``(M, N, C, ...)`` for N maps of classes;
            ``"multilabel"``: ``(M, N, C)`` of labels; ``"regression"``: ``(M, N, ...)`` means. Any floating type.
        targets: Class indices ``(N,)`` or ``(N, ...)``; labels ``(N, C)`` of 0 and 1; numbers ``(N, ...)``.
        method: See above.
        task: What the predictions are.
        variances: In regression, those of the members' predictions, of the shape of ``probabilities``: the NLL is then
            of the mixture of the members' normal distributions.
        folds: For ``"best"``; as many as there are samples if those are fewer.
        seed: Of the folds, and of the bags.
        rounds: Members that greedy selection adds, those that it begins with among them: its weights are multiples of
            one over at most that. Never less than M.
        bags: Greedy selections from random halves of the members, of which the mean is taken (the paper's bagged
            selection); 1: one from all. Meant for libraries of tens of members: half of a few is too few.
        tolerance: For ``"fit"``, how far in nats the NLL may be above the lowest.
        names: Of the members, for error messages.

    Returns:
        Weights ``(M,)``, none below 0, sum 1; on the device of ``probabilities``, float64 if those are, else float32.

    Raises:
        TypeError: Outputs or class indices of the wrong type.
        ValueError: Shapes that do not fit, an empty split, NaN or numbers that are no probabilities (with the member's
            number), targets out of range, or arguments out of theirs.

    Example:
        >>> good, bad = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]])
        >>> ensemble_weights(torch.stack([good, bad]), torch.tensor([0, 1]), "greedy")
        tensor([1., 0.])
    """
    _check_arguments(method, folds, rounds, bags, tolerance)
    objective = build_objective(probabilities, targets, task, variances, names)
    if method == "best":
        losses = [
            _cross_fit(objective, one, folds, seed, rounds, bags, tolerance).loss for one in ("uniform", "greedy")
        ]
        method = "greedy" if losses[1] < losses[0] else "uniform"
    weights = _fit(objective, method, rounds, bags, seed, tolerance)
    return weights.to(working_type(probabilities)).to(probabilities.device)


@dataclass(frozen=True)
class CrossFit:
    """What a method is worth on samples that it was not fitted on.

    Attributes:
        losses: ``(N,)`` float64: NLL (squared error) of each sample under the weights of the other folds.
        fold: ``(N,)`` int64: the fold that each sample belongs to.
        weights: ``(folds, M)`` float64: row f was fitted on all samples but those of fold f. Predictions that are
            weighed by ``weights[fold]`` are honest ones, and a temperature can be fitted on them too.
    """

    losses: Tensor
    fold: Tensor
    weights: Tensor

    @property
    def loss(self) -> float:
        """The mean of the losses."""
        return float(self.losses.mean())


def cross_fit(
    probabilities: Tensor,
    targets: Tensor,
    method: Method = "greedy",
    *,
    task: Task = "multiclass",
    variances: Tensor | None = None,
    folds: int = 5,
    seed: int = 0,
    rounds: int = 50,
    bags: int = 1,
    tolerance: float = 1e-6,
    names: Sequence[str] | None = None,
) -> CrossFit:
    """Fits the weights on all folds but one and judges them on that one, for each fold in turn.

    Two methods are compared by the difference of their ``losses``, sample by sample: folds are the same for the same
    seed and number of samples. Arguments and errors are those of :func:`ensemble_weights`.

    Raises:
        ValueError: Also if there are fewer than 2 samples; with ``"best"`` fewer than 3.
    """
    _check_arguments(method, folds, rounds, bags, tolerance)
    objective = build_objective(probabilities, targets, task, variances, names)
    return _cross_fit(objective, method, folds, seed, rounds, bags, tolerance)


def _cross_fit(
    objective: Objective, method: Method, folds: int, seed: int, rounds: int, bags: int, tolerance: float
) -> CrossFit:
    samples = objective.samples
    if samples < 2:
        raise ValueError("Cross-fitting needs 2 samples or more; with one, use method='uniform'.")
    folds = min(folds, samples)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    fold = torch.empty(samples, dtype=torch.long)
    fold[order] = torch.arange(samples) % folds
    losses = torch.empty(samples, dtype=torch.float64)
    weights = torch.empty(folds, objective.members, dtype=torch.float64)
    for f in range(folds):
        here = (fold == f).nonzero().flatten()
        others = (fold != f).nonzero().flatten()
        rest = objective.subset(others)
        chosen = _better(rest, folds, seed, rounds, bags, tolerance) if method == "best" else method
        weights[f] = _fit(rest, chosen, rounds, bags, seed, tolerance)
        losses[here] = objective.subset(here).losses(weights[f])
    return CrossFit(losses, fold, weights)


def _better(objective: Objective, folds: int, seed: int, rounds: int, bags: int, tolerance: float) -> Method:
    """Which of uniform and greedy is better on samples that it was not fitted on."""
    if objective.members == 1:
        return "uniform"
    uniform = _cross_fit(objective, "uniform", folds, seed, rounds, bags, tolerance).loss
    greedy = _cross_fit(objective, "greedy", folds, seed, rounds, bags, tolerance).loss
    return "greedy" if greedy < uniform else "uniform"


def _fit(objective: Objective, method: Method, rounds: int, bags: int, seed: int, tolerance: float) -> Tensor:
    """One of the methods but "best"."""
    if method == "uniform" or objective.members == 1:
        return as_weights(None, objective.members)
    if method == "fit":
        return objective.fit(tolerance)
    if bags == 1:
        return _greedy(objective, torch.arange(objective.members), rounds)
    generator = torch.Generator().manual_seed(seed)
    half = -(-objective.members // 2)
    drawn = [torch.randperm(objective.members, generator=generator)[:half].sort().values for _ in range(bags)]
    return torch.stack([_greedy(objective, members, rounds) for members in drawn]).mean(0)


def _greedy(objective: Objective, allowed: Tensor, rounds: int) -> Tensor:
    """Selection with replacement from the ``allowed`` members (indices). Of equally good ones, the first."""
    counts = torch.zeros(objective.members, dtype=torch.float64)
    alone = objective.losses_with_one_more(counts)
    ranking = allowed[torch.argsort(alone[allowed], stable=True)]

    # Sorted initialisation: without it the first few additions overfit.
    best, lowest = counts, float("inf")
    for member in ranking.tolist():
        counts = counts.clone()
        counts[member] += 1
        loss = objective.loss(counts / counts.sum())
        if loss < lowest:
            best, lowest = counts, loss
    counts = best.clone()
    for _ in range(max(rounds, len(allowed)) - int(counts.sum())):
        losses = objective.losses_with_one_more(counts)[allowed]
        chosen = int(losses.argmin())
        counts[allowed[chosen]] += 1
        if float(losses[chosen]) < lowest:
            best, lowest = counts.clone(), float(losses[chosen])
    return best / best.sum()


def _check_arguments(method: str, folds: int, rounds: int, bags: int, tolerance: float) -> None:
    check_choice("method of weights", method, Method)
    if folds < 2:
        raise ValueError(f"Cross-fitting takes 2 folds or more, not {folds}.")
    if rounds < 1 or bags < 1:
        raise ValueError(f"Greedy selection takes 1 round and 1 bag or more, not {rounds} and {bags}.")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, not {tolerance}.")
