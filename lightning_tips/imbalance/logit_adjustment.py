"""Logit adjustment (Menon et al. 2021, arXiv:2007.07314): the prior of the classes goes into the logits.

In the loss, ``tau * log(prior)`` is added to the logits, so that the network need not learn the prior and its own
logits come out balanced. After training of a plain network, the same numbers are subtracted from its logits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_tips.imbalance.weights import check_counts

__all__ = ["adjust_logits", "logit_adjustment"]


def logit_adjustment(counts_or_prior: Sequence[float] | Tensor, tau: float = 1.0) -> Tensor:
    """What to add to the logits in the training loss, or to subtract from them after plain training.

    Args:
        counts_or_prior: Samples of each class, or their shares.
        tau: Strength, > 0; 1 is consistent for the balanced error.

    Returns:
        Offsets ``(C,)`` in float32: ``tau * log(prior)``.

    Raises:
        ValueError: If a class is empty, a count is no number, or tau is not positive.

    Example:
        >>> logit_adjustment([900, 100]).exp()
        tensor([0.9000, 0.1000])
    """
    if not tau > 0.0:
        raise ValueError(f"tau must be positive, not {tau}.")
    counts = check_counts(counts_or_prior)
    return (tau * (counts / counts.sum()).log()).float()


def adjust_logits(logits: Tensor, offsets: Tensor) -> Tensor:
    """Logits of a plainly trained network for balanced classes: ``logits - offsets``.

    Args:
        logits: ``(N, C, ...)`` or ``(C,)``; with two classes also one logit for the second, ``(N,)`` or ``(N, 1)``.
        offsets: From :func:`logit_adjustment`.
    """
    return shift_logits(logits, -offsets)


def shift_logits(logits: Tensor, shift: Tensor) -> Tensor:
    """Adds ``shift`` ``(C,)`` along the classes, or its difference of two classes to a single logit."""
    shift = shift.to(logits.device, logits.dtype if logits.is_floating_point() else shift.dtype)
    dim = 1 if logits.ndim > 1 else 0
    if logits.ndim and logits.shape[dim] == len(shift) and not (logits.ndim == 1 and len(shift) == 2):
        return logits + along(shift, dim, logits.ndim)
    if len(shift) == 2 and (logits.ndim < 2 or logits.shape[1] == 1):
        return logits + (shift[1] - shift[0])
    raise ValueError(f"Logits of shape {tuple(logits.shape)} do not have the {len(shift)} classes of the prior.")


def along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """``values`` ``(C,)`` in a shape that broadcasts along dimension ``dim`` of ``ndim``."""
    return values.reshape(-1, *[1] * (ndim - dim - 1))
