"""What a network takes each class for."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor


def confusion_matrix(logits: Tensor, targets: Tensor) -> Tensor:
    """Counts (C, C): true classes in rows, the ones with the largest logit in columns.

    Args:
        logits: (N, C).
        targets: Class indices (N,); negative ones are left out.
    """
    classes = logits.shape[1]
    known = targets >= 0
    pairs = targets[known].long() * classes + logits[known].argmax(1)
    return pairs.bincount(minlength=classes * classes).reshape(classes, classes)


def recalls(confusion: Tensor) -> Tensor:
    """Share of each class that was found (C,); NaN for a class without samples."""
    return confusion.diag() / confusion.sum(1)


def as_classes(logits: Tensor, targets: Tensor, asker: str) -> tuple[Tensor, Tensor]:
    """Logits (N, C), also where a binary network gives one for the second class, and class indices (N,).

    Samples with a negative target, which losses ignore, are left out.

    Args:
        logits: (N, C), (N, 1) or (N,).
        targets: (N,) or (N, 1).
        asker: Who needs them, for messages.

    Raises:
        MisconfigurationException: If they are of another form.
    """
    if logits.ndim == 2 and logits.shape[1] == 1:
        logits = logits[:, 0]
    if logits.ndim == 1:
        logits = torch.stack([torch.zeros_like(logits), logits], 1)
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.is_floating_point() and bool(((targets == 0) | (targets == 1)).all()):
        targets = targets.long()  # as a binary loss wants them
    if logits.ndim != 2 or targets.ndim != 1 or len(logits) != len(targets) or targets.is_floating_point():
        raise MisconfigurationException(
            f"{asker} needs logits (N, C) and class indices (N,), not {tuple(logits.shape)} and"
            f" {tuple(targets.shape)} of {targets.dtype}."
        )
    if len(targets) and int(targets.max()) >= logits.shape[1]:
        raise MisconfigurationException(
            f"{asker} meets the class {int(targets.max())}, but the network has {logits.shape[1]} outputs."
            " Mark samples to ignore with a negative number."
        )
    known = targets >= 0
    return logits[known].float(), targets[known].long()
