"""The probe for the trap in augmenting the rare class only.

That is often advised. Taken literally it teaches a shortcut: every blurred or shifted image of the training data is of
the rare class, so the network flags what looks processed. The safe way is the same operations on all classes, and more
repeats of the rare one; the probe tells when the trap has shut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_tips.augmentation.batch import augment_batch
from lightning_tips.augmentation.policies import Policy
from lightning_tips.core import log_numbers, reason_of, split_batch

__all__ = ["Shortcut", "ShortcutWatch", "belong_to", "minority_classes", "shortcut_probe"]

PROBED_BATCHES = 8


def minority_classes(counts: Sequence[float] | Any) -> list[int]:
    """The classes with fewer samples than classes have on average, those without any left out of both.

    Example:
        >>> minority_classes([1000, 50])
        [1]
    """
    numbers = torch.as_tensor(counts).double()
    there = numbers[numbers > 0]
    mean = float(there.mean()) if len(there) else 0.0
    return [c for c, number in enumerate(numbers.tolist()) if 0 < number < mean]


def belong_to(targets: Tensor, classes: Sequence[int]) -> Tensor:
    """Whether each sample is of one of the classes (B,); with several labels a sample, whether it has one of them."""
    if targets.ndim == 2 and targets.shape[1] > 1:
        return targets[:, list(classes)].bool().any(1)
    return torch.isin(targets.reshape(-1).long(), torch.tensor(list(classes), device=targets.device))


@dataclass(frozen=True)
class Shortcut:
    """What the probe found: how many samples of other classes are taken for one that was augmented.

    Attributes:
        clean: Of them as they are.
        augmented: Of the same ones, augmented.
        total: How many there were.
    """

    clean: int
    augmented: int
    total: int

    @property
    def gap(self) -> float:
        """By how much the share of false alarms rises."""
        return (self.augmented - self.clean) / self.total if self.total else 0.0

    @property
    def shares(self) -> tuple[float, float]:
        """Of false alarms, among samples as they are and augmented."""
        return (self.clean / self.total, self.augmented / self.total) if self.total else (0.0, 0.0)

    def warning(self, classes: Sequence[int] | None) -> str:
        """What to do about it, where ``classes`` are augmented."""
        clean, augmented = self.shares
        return (
            f"The network takes {augmented:.0%} of other samples for the classes {classes} once they are"
            f" augmented, {clean:.0%} as they are: it has learnt that what looks augmented is of these classes."
            " Leave only_classes out and put an ImbalancedSamplerCallback beside it."
        )

    @property
    def suspicious(self) -> bool:
        """Whether it rises by 5 points or more, and by more than three standard errors."""
        if not self.total:
            return False
        shares = [(count + 1) / (self.total + 2) for count in (self.clean, self.augmented)]
        error = math.sqrt(sum(share * (1 - share) for share in shares) / self.total)
        return self.gap >= 0.05 and self.gap > 3 * error


@torch.no_grad()
def shortcut_probe(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    policy: Policy,
    classes: Sequence[int],
    seed: int = 0,
    **more: Any,
) -> Shortcut:
    """Compares false alarms on clean and on augmented samples of the classes that were not augmented in training.

    A network that was never shown an operation may also err on it for an honest reason; what is suspicious is that it
    errs towards the classes that were augmented.

    Args:
        model: Returns logits (N, C), or (N,) and (N, 1) for the second of two classes; called in the mode it is in.
        images: (N, C, H, W) of validation data.
        targets: Class indices (N,) or (N, 1); rows of 0 and 1 (N, C) where a sample may have several labels.
        policy: What was done to the chosen classes in training; see :func:`~lightning_tips.augmentation.read_policy`.
        classes: Which ones these were.
        seed: Of the augmentation.
        **more: Of :func:`~lightning_tips.augmentation.augment_batch`: ``value_range``, ``padding``.

    Raises:
        TypeError: If the model returns no logits.
    """
    several = targets.ndim == 2 and targets.shape[1] > 1
    images = images[~belong_to(targets, classes)]
    if not len(images):
        return Shortcut(0, 0, 0)
    augmented = augment_batch(images, policy, torch.arange(len(images)) + seed * 1_000_003, **more)
    chosen = torch.tensor(list(classes), device=images.device)

    def flagged(part: Tensor) -> int:
        logits = model(part)
        if not isinstance(logits, Tensor) or logits.ndim > 2 or len(logits) != len(part):
            raise TypeError("calling the module with images does not return logits (N, C)")
        found = (logits[:, chosen] > 0).any(1) if several else torch.isin(_decide(logits), chosen)
        return int(found.sum())

    return Shortcut(flagged(images), flagged(augmented), len(images))


def _decide(logits: Tensor) -> Tensor:
    if logits.ndim == 1 or logits.shape[1] == 1:
        return (logits.reshape(-1) > 0).long()
    return logits.argmax(1)


class ShortcutWatch:
    """Probes the first batches of each validation of a run.

    Args:
        policy: As for :func:`shortcut_probe`, like what follows.
        classes: Likewise.
        seed: Likewise.
        **more: Likewise.
    """

    def __init__(self, policy: Policy, classes: Sequence[int], seed: int, **more: Any) -> None:
        self._policy, self._classes, self._seed, self._more = policy, classes, seed, more
        self._counts = [0, 0, 0]
        self._failed = False

    def begin(self) -> None:
        """A validation begins."""
        self._counts = [0, 0, 0]

    def look(self, module: Any, batch: Any, batch_idx: int, input_key: str | None, target_key: str | None) -> None:
        """Probes one batch. Where that cannot be done it warns, once, and training goes on without the probe."""
        if self._failed or batch_idx >= PROBED_BATCHES:
            return
        try:
            images, targets = split_batch(batch, input_key, target_key)
            found = shortcut_probe(
                module, images, targets, self._policy, self._classes, self._seed + batch_idx, **self._more
            )
        except torch.OutOfMemoryError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # of a forward of any kind
            self._failed = True
            rank_zero_warn(
                f"only_classes={list(self._classes)} cannot be probed for the shortcut that it teaches:"
                f" {reason_of(error)}. Compare with a run that augments all classes."
            )
            return
        counts = (found.clean, found.augmented, found.total)
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]

    def finish(self, trainer: pl.Trainer) -> Shortcut:
        """What this validation found on all ranks, which all must call. Logs the gap."""
        counts = torch.tensor(self._counts, dtype=torch.float32, device=trainer.strategy.root_device)
        counts = counts if trainer.world_size == 1 else trainer.strategy.reduce(counts, reduce_op="sum")
        found = Shortcut(*(int(n) for n in counts.tolist()))
        if found.total:
            log_numbers(trainer, {"tips/augmentation/shortcut_gap": found.gap})
        return found
