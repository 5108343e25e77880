"""Quadratic functions on the simplex: what the fitted weights of an ensemble come down to."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["minimise_quadratic"]


def minimise_quadratic(matrix: Tensor) -> Tensor:
    """The weights that minimise ``w @ matrix @ w`` with ``w >= 0`` and ``w.sum() == 1``.

    An active set method, after Wolfe 1976, "Finding the nearest point in a polytope", Mathematical Programming 11: the
    member with the steepest descent joins, the best mixture of those that have joined is solved for, and those whose
    weight it would turn negative leave. It ends after finitely many steps; a step is a least squares problem of at most
    M + 1 unknowns.

    A linear term needs no argument: on the simplex ``c @ w`` is ``w @ ((c + c.T) / 2) @ w`` with c as a column.

    Args:
        matrix: ``(M, M)`` float64, symmetric; convex along the simplex, which for directions with sum 0 means that
            ``v @ matrix @ v >= 0``.

    Returns:
        ``(M,)`` float64.
    """
    members = len(matrix)
    tolerance = 1e-13 * float(matrix.abs().max().clamp_min(1e-300))
    first = int(matrix.diagonal().argmin())
    weights = torch.zeros(members, dtype=matrix.dtype)
    weights[first] = 1.0
    support = [first]
    for _ in range(20 * members + 20):
        slope = matrix @ weights
        joins = int(slope.argmin())
        if float(slope @ weights - slope[joins]) <= tolerance or joins in support:
            break
        support.append(joins)
        while True:
            best = _on_plane(matrix[support][:, support])
            now = weights[support]
            if bool((best > 0).all()):
                weights[support] = best / best.sum()
                break
            # As far towards the best mixture as the first weight to reach 0 allows; that one leaves.
            falling = best <= 0
            reach = torch.where(falling, now / (now - best).clamp_min(1e-300), torch.inf)
            leaves = int(reach.argmin())
            now = (now + reach[leaves] * (best - now)).clamp_min(0.0)
            weights[support] = now
            weights[support[leaves]] = 0.0
            weights /= weights.sum()
            del support[leaves]
    return weights


def _on_plane(matrix: Tensor) -> Tensor:
    """Minimises the same without ``w >= 0``: the condition of Lagrange, a linear system."""
    size = len(matrix)
    # Scaled, so that the row of the constraint is as large as the others.
    scale = matrix.abs().max().clamp_min(1e-300)
    system = torch.ones(size + 1, size + 1, dtype=matrix.dtype)
    system[:size, :size] = matrix / scale
    system[size, size] = 0.0
    right = torch.zeros(size + 1, 1, dtype=matrix.dtype)
    right[size] = 1.0
    return torch.linalg.lstsq(system, right, driver="gelsd").solution[:size, 0]
