"""What the callback asks of the batches, the data and the module that it finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_tips.core import targets_of

__all__ = ["TAKES_MIXED", "batch_size_of", "belong_to", "label_names", "own_numbers", "refuse_hard_losses"]

UNKNOWN_SIZE = 1 << 20  # more samples than a batch has, where a loader does not tell its batch size

# Losses that take class indices only. timm is known by name, because importing it takes seconds.
HARD_LOSSES = (
    "torch.nn.modules.loss.NLLLoss",
    "torch.nn.modules.loss.MultiMarginLoss",
    "torch.nn.modules.loss.MultiLabelMarginLoss",
    "timm.loss.cross_entropy.LabelSmoothingCrossEntropy",
    "timm.loss.jsd.JsdCrossEntropy",
)
TAKES_MIXED = (
    "a loss that takes probabilities (B, C), as nn.CrossEntropyLoss (label_smoothing included), F.cross_entropy,"
    " nn.BCEWithLogitsLoss and timm's SoftTargetCrossEntropy do, and metrics on targets.argmax(1)"
)


def refuse_hard_losses(module: nn.Module) -> None:
    """Raises for a loss that is known to take no mixed targets.

    Raises:
        MisconfigurationException: If there is one among the module's parts.
    """
    for name, part in module.named_modules():
        if f"{type(part).__module__}.{type(part).__name__}" in HARD_LOSSES:
            raise MisconfigurationException(
                f"{type(part).__name__} ({name!r}) takes class indices only, but mixup and cutmix make probabilities"
                f" of them. Use {TAKES_MIXED}; or leave mixup and cutmix at 0."
            )


def belong_to(targets: Tensor, classes: list[int]) -> Tensor:
    """Whether each sample is of one of the classes (B,); with several labels a sample, whether it has one of them."""
    if targets.ndim == 2 and targets.shape[1] > 1:
        return targets[:, classes].bool().any(1)
    return torch.isin(targets.reshape(-1).long(), torch.tensor(classes, device=targets.device))


def batch_size_of(loader: Any) -> int:
    """The size of all batches but the last one, as the loader tells it; else more than any batch has."""
    for owner in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(owner, "batch_size", None)
        if isinstance(size, int) and size > 0:
            return size
    return UNKNOWN_SIZE


def own_numbers(batch: Any, key: int | str) -> NDArray[np.int64]:
    """The samples' own numbers (B,) in a batch.

    Raises:
        KeyError: If there is nothing under the key.
        TypeError: If that is no row of integers.
    """
    try:
        numbers = batch[key]
    except (KeyError, IndexError, TypeError) as error:
        raise KeyError(f"The batch has no samples' numbers under sample_key={key!r}.") from error
    if not isinstance(numbers, Tensor) or numbers.ndim != 1 or numbers.is_floating_point():
        raise TypeError(f"The samples' numbers under sample_key={key!r} must be integers (B,).")
    return numbers.cpu().numpy().astype(np.int64)


def label_names(dataset: Any, batch: Any, count: int, target_key: str | None = None) -> list[str]:
    """What the first ``count`` samples of a batch are, by name where the dataset has ``classes``; "" where unknown."""
    try:
        targets = targets_of(batch, target_key)[:count]
    except (KeyError, TypeError):
        return [""] * count
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.numel() != count:
        return [""] * count
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset  # a Subset
    names = getattr(dataset, "classes", None)
    classes = [int(target) for target in targets.reshape(-1)]
    known = isinstance(names, Sequence) and max(classes) < len(names)
    return [str(names[c]) if known else str(c) for c in classes]  # type: ignore[index]
