"""All operations, by name."""

from __future__ import annotations

from lightning_tips.augmentation.looks import Blur, Brightness, ColourOperation, Contrast, Erase, Hue, Saturation
from lightning_tips.augmentation.moves import Crop, GeometryOperation, HorizontalFlip, Rotate, Shift, VerticalFlip
from lightning_tips.augmentation.operation import NUMBERS, Operation

__all__ = [
    "NUMBERS",
    "OPERATIONS",
    "Blur",
    "Brightness",
    "ColourOperation",
    "Contrast",
    "Crop",
    "Erase",
    "GeometryOperation",
    "HorizontalFlip",
    "Hue",
    "Operation",
    "Rotate",
    "Saturation",
    "Shift",
    "VerticalFlip",
]

OPERATIONS: dict[str, type[Operation]] = {
    cls.__name__: cls
    for cls in (HorizontalFlip, VerticalFlip, Rotate, Shift, Crop, Brightness, Contrast, Saturation, Hue, Blur, Erase)
}
"""What a policy can name."""
