"""What can be known to be wrong before the first batch is augmented."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def check_arguments(
    steps: list[Any],
    mixup: float,
    cutmix: float,
    only_classes: list[int] | str | None,
    last_epochs_off: int,
    padding: str,
) -> None:
    """Refuses arguments of ``BatchAugmentationCallback`` that make no sense, each with what to do instead.

    Raises:
        ValueError: For the first of them.
    """
    if not steps and not mixup and not cutmix:
        raise ValueError("The policy is empty and nothing is mixed: there is nothing to do. Leave the tip out.")
    if mixup < 0 or cutmix < 0:
        raise ValueError(f"mixup={mixup} and cutmix={cutmix} must not be negative; 0 switches one off.")
    if isinstance(only_classes, str) and only_classes != "minority":
        raise ValueError(f"only_classes={only_classes!r} must be 'minority', a list of class indices or None.")
    if only_classes is not None and not only_classes:
        raise ValueError("only_classes=[] augments nothing: name classes, or leave it out to augment all.")
    if only_classes is not None and (mixup or cutmix):
        raise ValueError("Mixing is of all classes: leave mixup and cutmix at 0 with only_classes.")
    if last_epochs_off < 0:
        raise ValueError(f"last_epochs_off={last_epochs_off} must not be negative.")
    if padding not in ("zeros", "border", "reflection"):
        raise ValueError(f"padding={padding!r} must be 'zeros', 'border' or 'reflection'.")


def check_last_epochs(trainer: pl.Trainer, last_epochs_off: int) -> None:
    """Refuses last epochs that nobody can know, or that are all there are.

    Raises:
        MisconfigurationException: For a Trainer without ``max_epochs``, or with too few of them.
    """
    if last_epochs_off and (trainer.max_epochs is None or trainer.max_epochs < 0):
        raise MisconfigurationException(
            "last_epochs_off needs to know which epochs are the last: give the Trainer max_epochs."
        )
    if last_epochs_off and last_epochs_off >= (trainer.max_epochs or 0):
        raise MisconfigurationException(
            f"last_epochs_off={last_epochs_off} of max_epochs={trainer.max_epochs} leaves no epoch with"
            " augmentation: lower it, or leave the tip out."
        )


def warn_if_never_off(trainer: pl.Trainer, last_epochs_off: int) -> None:
    """Says so where ``max_steps`` ends the run before the last epochs begin; once the loaders are made."""
    batches = trainer.num_training_batches
    if not last_epochs_off or trainer.max_steps < 0 or not math.isfinite(batches):
        return
    steps_before = ((trainer.max_epochs or 0) - last_epochs_off) * math.ceil(batches / trainer.accumulate_grad_batches)
    if trainer.max_steps <= steps_before:
        rank_zero_warn(
            f"max_steps={trainer.max_steps} ends the run before the last {last_epochs_off} of"
            f" max_epochs={trainer.max_epochs}, so augmentation never goes off: lower max_epochs to what max_steps"
            " allows, or leave last_epochs_off out."
        )
