"""What the callback asks of the batches, the data and the module that it finds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tips.augmentation.operations import GeometryOperation, Operation
from lightning_tips.augmentation.policies import Step
from lightning_tips.augmentation.shortcut import minority_classes
from lightning_tips.core import class_counts, find_labels, targets_of

__all__ = [
    "TAKES_MIXED",
    "chosen_classes",
    "first_mixed_step",
    "label_names",
    "number_of_classes",
    "refuse_hard_losses",
    "refuse_what_would_stay",
]

# Losses that take class indices only. timm is known by name, because importing it takes seconds.
HARD_LOSSES = (
    "torch.nn.modules.loss.NLLLoss",
    "torch.nn.modules.loss.MultiMarginLoss",
    "torch.nn.modules.loss.MultiLabelMarginLoss",
    "timm.loss.cross_entropy.LabelSmoothingCrossEntropy",
    "timm.loss.jsd.JsdCrossEntropy",
)
# What names call things that lie in places of an image.
_PLACES = {"box", "boxes", "bbox", "bboxes", "keypoint", "keypoints"}
_MASKS = {"mask", "masks"}
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


def refuse_what_would_stay(batch: Any, images: Tensor, steps: Sequence[Step], target_key: str | None = None) -> None:
    """Raises where images are moved and their masks or boxes are not: every one would be in the wrong place.

    Operations that leave pixels where they are (colours, blur, erasing) go with any target.

    Args:
        batch: Of the training data.
        images: Its images, (B, C, H, W).
        steps: Of the policy.
        target_key: Where the targets stand, if not under a usual name.

    Raises:
        MisconfigurationException: With what to leave out.
    """
    moving = [type(s).__name__ for s in steps if isinstance(s, GeometryOperation) or not isinstance(s, Operation)]
    if not moving:
        return
    try:
        targets = targets_of(batch, target_key)
    except (KeyError, TypeError):
        targets = None
    for name, part in _named_parts(batch):
        if part is images:
            continue
        words = set(re.split(r"[._]", name.lower()))
        spatial = isinstance(part, Tensor) and _is_spatial(part, images)
        if words & _PLACES or (spatial and (part is targets or not part.is_floating_point() or words & _MASKS)):
            raise MisconfigurationException(
                f"{', '.join(moving)} would move the images, but not {name!r} in the batch, so the two would no longer"
                " belong together. Move both in the dataset (torchvision.transforms.v2 takes images, masks and boxes"
                " together), and leave here what moves nothing: Brightness, Contrast, Saturation, Hue, Blur, Erase."
            )
        if spatial:
            rank_zero_warn(
                f"{', '.join(moving)} move the images, but not {name!r} in the batch, which has the same height and"
                " width. If the two belong together, move both in the dataset instead."
            )


def _named_parts(batch: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All that is in a batch of any form, with the way to it; lists under a name are one part."""
    if isinstance(batch, Mapping):
        pairs: Any = batch.items()
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        pairs = enumerate(batch)
    else:
        yield name, batch
        return
    for key, part in pairs:
        yield from _named_parts(part, f"{name}.{key}" if name else str(key))


def _is_spatial(part: Tensor, images: Tensor) -> bool:
    """Whether it has a row for each image, and their height and width, or the same share of both."""
    if part.ndim < 3 or len(part) != len(images):
        return False
    (height, width), (tall, wide) = images.shape[-2:], part.shape[-2:]
    return tall > 1 and wide > 1 and tall * width == wide * height


def chosen_classes(only: Sequence[int] | str | None, loader: Any, target_key: str | None = None) -> list[int] | None:
    """Which classes ``only_classes`` means, by the training labels; None: all.

    Raises:
        MisconfigurationException: If there are no labels, no such classes, or no minority.
    """
    if only is None:
        return None
    counts = _counts(loader, target_key)
    if only == "minority":
        if chosen := minority_classes(counts):
            return chosen
        raise MisconfigurationException(
            "only_classes='minority', but all classes have equally many training samples: leave it out."
        )
    chosen = [int(c) for c in only]
    if unknown := [c for c in chosen if not 0 <= c < len(counts)]:
        raise MisconfigurationException(
            f"only_classes names the classes {unknown}, but there are only 0 to {len(counts) - 1}."
        )
    if empty := [c for c in chosen if not int(counts[c])]:
        raise MisconfigurationException(
            f"only_classes names the classes {empty}, of which there are no training samples: leave them out."
        )
    return chosen


def number_of_classes(module: Any, loader: Any, target_key: str | None = None) -> int | None:
    """The module's ``num_classes`` or that of the training labels; None where neither tells."""
    for owner in (module, getattr(module, "hparams", {})):
        found = owner.get("num_classes") if isinstance(owner, Mapping) else getattr(owner, "num_classes", None)
        if isinstance(found, int):
            return found
    try:
        return len(_counts(loader, target_key))
    except MisconfigurationException:
        return None  # wanted for class indices only; mix_batch then says to pass num_classes


def _counts(loader: Any, target_key: str | None) -> Any:
    if isinstance(loader, Mapping | list | tuple):
        raise MisconfigurationException(
            f"There are {len(loader)} training loaders, and it is not known in which one to count the classes, as"
            " only_classes wants. Train with one loader, or augment all classes."
        )
    try:
        return class_counts(find_labels(getattr(loader, "dataset", loader), target_key))
    except (ValueError, TypeError) as error:
        raise MisconfigurationException(f"The classes of the training samples are not known: {error}") from error


def first_mixed_step(step: Callable[[], Any]) -> Any:
    """Runs the first training step that gets mixed targets; what fails in it fails because of them, most likely.

    Raises:
        MisconfigurationException: With what takes mixed targets.
    """
    try:
        return step()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
        raise MisconfigurationException(
            f"The training step does not take mixed targets: {error}. Mixup and cutmix need {TAKES_MIXED}; for one"
            " logit a sample let the dataset give floats (B,); or leave them at 0."
        ) from error


def label_names(dataset: Any, batch: Any, count: int, target_key: str | None = None) -> list[str]:
    """What the first ``count`` samples of a batch are, by name where the dataset has ``classes``; "" where unknown."""
    try:
        targets = targets_of(batch, target_key)[:count]
    except (KeyError, TypeError):
        return [""] * count
    if not isinstance(targets, Tensor) or len(targets) != count or targets.ndim > 2:
        return [""] * count
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset  # a Subset
    names = getattr(dataset, "classes", None)

    def name(label: int) -> str:
        return str(names[label]) if isinstance(names, Sequence) and 0 <= label < len(names) else str(label)

    if targets.ndim == 2 and targets.shape[1] > 1:  # those that it has, of several labels
        return [", ".join(name(c) for c in row.nonzero()[:, 0].tolist()) for row in (targets > 0.5).cpu()]
    flat = targets.reshape(-1).tolist()
    if any(label != int(label) for label in flat):  # measured, not named
        return [f"{label:.3g}" for label in flat]
    return [name(int(label)) for label in flat]
