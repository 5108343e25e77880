"""Tip 5: augmentation. Each image with parameters of its own, on the device, the same in every run."""

from lightning_tips.augmentation.batch import augment_batch
from lightning_tips.augmentation.callback import BatchAugmentationCallback
from lightning_tips.augmentation.guard import GuardRow, guard_table, label_guard, safe_operation
from lightning_tips.augmentation.mix import mix_batch
from lightning_tips.augmentation.operations import (
    OPERATIONS,
    Blur,
    Brightness,
    Contrast,
    Crop,
    Erase,
    HorizontalFlip,
    Hue,
    Operation,
    Rotate,
    Saturation,
    Shift,
    VerticalFlip,
)
from lightning_tips.augmentation.policies import POLICIES, read_policy
from lightning_tips.augmentation.preview import contact_sheet
from lightning_tips.augmentation.shortcut import Shortcut, minority_classes, shortcut_probe

__all__ = [
    "OPERATIONS",
    "POLICIES",
    "BatchAugmentationCallback",
    "Blur",
    "Brightness",
    "Contrast",
    "Crop",
    "Erase",
    "GuardRow",
    "HorizontalFlip",
    "Hue",
    "Operation",
    "Rotate",
    "Saturation",
    "Shift",
    "Shortcut",
    "VerticalFlip",
    "augment_batch",
    "contact_sheet",
    "guard_table",
    "label_guard",
    "minority_classes",
    "mix_batch",
    "read_policy",
    "safe_operation",
    "shortcut_probe",
]
