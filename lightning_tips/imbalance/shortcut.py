"""Augmenting by class, and the probe for the trap in it.

Augmenting only the rare class is often advised. Taken literally it teaches a shortcut: every blurred or shifted image
of the training data is of the rare class, so the network flags what looks processed. The safe way is the same
operations on all classes, and more repeats for the rare one; the probe tells when the trap has shut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Augment = Callable[[Tensor], Tensor]
"""One image (C, H, W) to one of the same shape; a torchvision v2 transform, for example."""


def minority_classes(counts: Sequence[float] | Tensor) -> list[int]:
    """The classes with fewer samples than classes have on average.

    Example:
        >>> minority_classes([1000, 50])
        [1]
    """
    numbers = torch.as_tensor(counts).double()
    return [c for c, number in enumerate(numbers.tolist()) if number < float(numbers.mean())]


def augment_samples(images: Tensor, augment: Augment, seeds: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Augments each image by itself, each with random numbers of its own.

    Args:
        images: (B, C, H, W), any dtype that ``augment`` takes.
        augment: See :data:`Augment`.
        seeds: (B,) integers; an image's result depends on its seed and on nothing else. The global generators are
            left as they were.
        chosen: (B,) bool, which images to augment; by default all.

    Returns:
        A new tensor; images that are not chosen are copied.

    Raises:
        ValueError: If ``augment`` changes the shape or there is not one seed for each image.
    """
    if len(seeds) != len(images):
        raise ValueError(f"There are {len(seeds)} seeds for {len(images)} images.")
    result = images.clone()
    places = range(len(images)) if chosen is None else chosen.nonzero()[:, 0].tolist()
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        for place in places:
            torch.manual_seed(int(seeds[place]))
            augmented = augment(images[place])
            if augmented.shape != images[place].shape:
                raise ValueError(
                    f"The augmentation turned an image of {tuple(images[place].shape)} into one of"
                    f" {tuple(augmented.shape)}; it must keep the shape."
                )
            if augmented.dtype != images.dtype:
                raise ValueError(
                    f"The augmentation turned an image of {images.dtype} into one of {augmented.dtype}; it must keep"
                    " the dtype. Convert in the dataset."
                )
            result[place] = augmented
    return result


@dataclass(frozen=True)
class Shortcut:
    """What the probe found: how many samples of other classes are taken for a rare one.

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
    def suspicious(self) -> bool:
        """Whether it rises by 5 points or more, and by more than three standard errors."""
        if not self.total:
            return False
        shares = [(count + 1) / (self.total + 2) for count in (self.clean, self.augmented)]
        error = math.sqrt(sum(share * (1 - share) for share in shares) / self.total)
        return self.gap >= 0.05 and self.gap > 3 * error


@torch.no_grad()
def shortcut_probe(
    model: nn.Module, images: Tensor, targets: Tensor, augment: Augment, rare: Sequence[int], seed: int = 0
) -> Shortcut:
    """Compares false alarms on clean and on augmented samples of the other classes.

    A network that was never shown an operation may also err on it for an honest reason; what is suspicious is that it
    errs towards the classes that were augmented.

    Args:
        model: Returns logits (N, C), or (N,) and (N, 1) for the second of two classes; called in the mode it is in.
        images: (N, C, H, W) of validation data.
        targets: Class indices (N,) or (N, 1); rows of 0 and 1 (N, C) where a sample may have several labels.
        augment: What was done to the rare classes in training.
        rare: Which classes these were.
        seed: Of the augmentation.
    """
    classes = torch.tensor(list(rare), device=targets.device)
    several = targets.ndim == 2 and targets.shape[1] > 1
    images = images[~belong(targets, rare)]
    if not len(images):
        return Shortcut(0, 0, 0)
    augmented = augment_samples(images, augment, torch.arange(len(images)) + seed * 1_000_003)

    def flagged(part: Tensor) -> int:
        logits = model(part)
        found = (logits[:, classes] > 0).any(1) if several else torch.isin(_decide(logits), classes)
        return int(found.sum())

    return Shortcut(flagged(images), flagged(augmented), len(images))


def belong(targets: Tensor, classes: Sequence[int]) -> Tensor:
    """Whether each sample is of one of the classes (B,); with several labels a sample, whether it has one of them."""
    if targets.ndim == 2 and targets.shape[1] > 1:
        return targets[:, list(classes)].bool().any(1)
    return torch.isin(targets.reshape(-1).long(), torch.tensor(list(classes), device=targets.device))


def _decide(logits: Tensor) -> Tensor:
    if logits.ndim == 1 or logits.shape[1] == 1:
        return (logits.reshape(-1) > 0).long()
    return logits.argmax(1)
