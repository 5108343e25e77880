"""The label guard: does an operation keep what an image is of? Asked of a trained network, class by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tips.augmentation.batch import augment_batch
from lightning_tips.augmentation.operations import Blur, ColourOperation, Crop, Erase, Operation, Rotate, Shift
from lightning_tips.augmentation.policies import Policy, Step, read_policy
from lightning_tips.core import render_table

__all__ = ["GuardRow", "guard_table", "label_guard", "safe_operation"]

BATCH = 256


@dataclass(frozen=True)
class GuardRow:
    """One operation on one class.

    Attributes:
        operation: Its name and ranges.
        label: The class.
        samples: How many there were.
        clean_accuracy: Share of them that is recognised as they are.
        accuracy: Share that is recognised augmented.
        clean_confidence: Mean probability of the true class, as they are.
        confidence: Augmented.
        lost: Samples that are recognised as they are, but not augmented.
        gained: The other way round.
        taken_for: The class that the lost ones are mostly taken for; -1 without any.
        taken_share: Share of the lost ones that is taken for it.
    """

    operation: str
    label: int
    samples: int
    clean_accuracy: float
    accuracy: float
    clean_confidence: float
    confidence: float
    lost: int
    gained: int
    taken_for: int
    taken_share: float

    @property
    def drop(self) -> float:
        """By how much the accuracy falls."""
        return self.clean_accuracy - self.accuracy

    def flagged(self, most: float = 0.1) -> bool:
        """Whether accuracy falls by ``most`` or more, and by more than three standard errors of that."""
        error = math.sqrt(self.lost + self.gained + 1) / max(self.samples, 1)
        return self.drop >= most and self.drop > 3 * error

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.flagged():
            return "kept"
        if self.taken_share >= 0.5 and self.lost >= 5:
            return f"becomes class {self.taken_for}"
        return "lost or never seen"


@torch.no_grad()
def label_guard(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    policy: Policy,
    seed: int = 0,
    value_range: tuple[float, float] | None = None,
    convert: Callable[[Tensor], Tensor] | None = None,
) -> list[GuardRow]:
    """Compares a trained network on augmented and on clean validation images, for each operation and class.

    Each operation is applied alone, to every image (its ``p`` set to 1). What it cannot know: a network that never saw
    an operation in training errs on harmless ones too, so a fall shows that either the content changed or the network
    does not know the operation; that most of the lost images are taken for one and the same other class speaks for the
    former. And a network that was trained with a harmful operation may have learnt to live with it.

    Args:
        model: Trained; returns logits (N, C). A module is put into eval mode for it, and gets the images on its own
            device.
        images: (N, C, H, W) of validation data: about 100 a class or more, as fewer can show large falls only.
        targets: (N,) class indices.
        policy: See :func:`~lightning_tips.augmentation.read_policy`.
        seed: Of the augmentation.
        value_range: See :func:`~lightning_tips.augmentation.augment_batch`.
        convert: From images to what ``model`` takes, for example ``lambda x: x.float() / 255``.

    Returns:
        A row for each operation and class that occurs.

    Raises:
        ValueError: For targets that are no class indices, or a model that returns no logits.
    """
    if targets.shape != images.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"The guard goes class by class: targets must be class indices ({len(images)},), one for each image, not"
            f" {targets.dtype} of {tuple(targets.shape)}."
        )
    seeds = torch.arange(len(images)) + seed * 1_000_003
    clean = _probabilities(model, images, convert)
    rows: list[GuardRow] = []
    for step in _applicable(policy, images):
        alone = replace(step, p=1.0) if isinstance(step, Operation) else step
        parts = zip(images.split(BATCH), seeds.split(BATCH), strict=True)
        augmented = torch.cat([augment_batch(x, [alone], s, value_range=value_range) for x, s in parts])
        rows += _rows(_name(alone), clean, _probabilities(model, augmented, convert), targets.to(clean.device))
    return rows


def _applicable(policy: Policy, images: Tensor) -> Iterator[Step]:
    for step in read_policy(policy):
        if not (isinstance(policy, str) and isinstance(step, Operation) and step.rgb_only and images.shape[1] != 3):
            yield step


def _probabilities(model: Any, images: Tensor, convert: Any) -> Tensor:
    """(N, C), where the images are."""
    training = [part for part in model.modules() if part.training] if isinstance(model, nn.Module) else []
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    parts = []
    for part in training:  # in training mode it would learn from what it is shown, by its BatchNorm
        part.training = False
    try:
        for images_of_part in images.split(BATCH):
            taken = images_of_part if convert is None else convert(images_of_part)
            logits = model(taken if weight is None else taken.to(weight.device))
            if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
                raise ValueError("The guard needs a model that returns logits (N, C), with a column for each class.")
            parts.append(logits.float().softmax(1).to(images.device))
    finally:
        for part in training:
            part.training = True
    return torch.cat(parts)


def _rows(name: str, clean: Tensor, augmented: Tensor, targets: Tensor) -> Iterator[GuardRow]:
    for label in targets.unique().tolist():
        here = targets == label
        before, after = clean[here], augmented[here]
        right, still = before.argmax(1) == label, after.argmax(1) == label
        lost = right & ~still
        taken = after[lost].argmax(1).bincount(minlength=after.shape[1])
        number = int(lost.sum())
        yield GuardRow(
            operation=name,
            label=int(label),
            samples=int(here.sum()),
            clean_accuracy=float(right.float().mean()),
            accuracy=float(still.float().mean()),
            clean_confidence=float(before[:, label].mean()),
            confidence=float(after[:, label].mean()),
            lost=number,
            gained=int((~right & still).sum()),
            taken_for=int(taken.argmax()) if number else -1,
            taken_share=float(taken.max()) / number if number else 0.0,
        )


def guard_table(rows: list[GuardRow], names: list[str] | None = None, all_rows: bool = False) -> str:
    """The flagged rows, or all, as a table for a terminal; the largest falls first.

    Accuracy and mean confidence in the true class go from those on clean images to those on augmented ones. "Lost or
    never seen": either the content is lost, or the network has never seen the operation in training.

    Args:
        rows: Of :func:`label_guard`.
        names: Of the classes.
        all_rows: Whether to show those too that are not flagged.
    """
    shown = sorted((row for row in rows if all_rows or row.flagged()), key=lambda row: -row.drop)
    if not shown:
        return f"None of {len(rows)} pairs of operation and class loses its label."

    def name(label: int) -> str:
        return names[label] if names is not None and 0 <= label < len(names) else str(label)

    columns = ("operation", "class", "samples", "accuracy", "confidence", "verdict")
    cells = [
        (
            row.operation,
            name(row.label),
            str(row.samples),
            f"{row.clean_accuracy:.0%} to {row.accuracy:.0%}",
            f"{row.clean_confidence:.2f} to {row.confidence:.2f}",
            row.verdict.replace(f"class {row.taken_for}", name(row.taken_for)),
        )
        for row in shown
    ]
    return render_table(columns, cells)


def safe_operation(
    model: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor, operation: Operation, **more: Any
) -> Operation | None:
    """The operation with its range shrunk until the guard passes it: to three quarters, a half, a quarter, an eighth.

    Args:
        model: See :func:`label_guard`, which also tells the other arguments.
        images: Likewise.
        targets: Likewise.
        operation: Flips cannot be shrunk: they pass or do not.
        **more: Likewise.

    Returns:
        None if not even the smallest passes.
    """
    for share in (1.0, 0.75, 0.5, 0.25, 0.125):
        smaller = _shrunk(operation, share)
        if smaller is not None and not any(
            row.flagged() for row in label_guard(model, images, targets, [smaller], **more)
        ):
            return smaller
    return None


def _shrunk(operation: Operation, share: float) -> Operation | None:
    kept: Any = operation
    if share == 1.0:
        return operation
    if isinstance(operation, Rotate):
        low, high = kept.degrees
        return replace(operation, degrees=(share * low, share * high))
    if isinstance(operation, ColourOperation):
        middle, (low, high) = operation.neutral, operation.interval
        return replace(kept, amount=(middle + share * (low - middle), middle + share * (high - middle)))
    if isinstance(operation, Shift):
        if operation.by < 1:
            return replace(operation, by=operation.by * share)
        return replace(operation, by=int(operation.by * share)) if operation.by * share >= 1 else None
    if isinstance(operation, Crop):
        (low, high), (narrow, wide) = kept.area, kept.ratio
        ratio = (narrow**share, wide**share)  # towards 1
        return replace(operation, area=(1 - share * (1 - low), 1 - share * (1 - high)), ratio=ratio)
    if isinstance(operation, Erase):
        return replace(kept, area=(share * kept.area[0], share * kept.area[1]))
    if isinstance(operation, Blur):
        return replace(kept, sigma=(max(share * kept.sigma[0], 0.01), max(share * kept.sigma[1], 0.01)))
    return None


def _name(step: Step) -> str:
    if not isinstance(step, Operation):
        return type(step).__name__
    ranges = {key: value for key, value in vars(step).items() if key != "p" and value is not None}
    shown = [_range(value) if len(ranges) == 1 else f"{key} {_range(value)}" for key, value in ranges.items()]
    return type(step).__name__ + (f"({', '.join(shown)})" if shown else "")


def _range(value: Any) -> str:
    if not isinstance(value, tuple):
        return f"{value:.4g}"
    return f"{value[0]:.4g}" if value[0] == value[1] else f"{value[0]:.4g} to {value[1]:.4g}"
