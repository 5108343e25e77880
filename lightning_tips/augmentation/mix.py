"""Mixup and CutMix: two images made one, and their labels in the same proportion."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mix_batch", "soft_targets"]


@torch.no_grad()
def mix_batch(
    images: Tensor, targets: Tensor, num_classes: int | None, mixup: float = 0.0, cutmix: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Mixes each image of a batch with another one of it (Zhang et al. 2018, Yun et al. 2019).

    The partners are a permutation of the batch; each image has a share of its own, from Beta(alpha, alpha). With both
    alphas positive half of the images, by chance, are blended and half pasted into.

    Args:
        images: (B, C, H, W) uint8 or float.
        targets: (B,) class indices; or (B, C) of 0 and 1 (several labels) or of probabilities; or (B,) and (B, 1)
            floats from 0 to 1, for one binary label.
        num_classes: C, for class indices.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        seed: The result is a function of the batch and of this.

    Returns:
        Images of the same dtype, and float32 targets: (B, C), or of the shape they had if they were no class indices.

    Raises:
        ValueError: For alphas below 0 or targets that cannot be mixed.
        TypeError: For images or targets of other dtypes.
    """
    if mixup < 0 or cutmix < 0:
        raise ValueError(f"mixup={mixup} and cutmix={cutmix} must not be negative; 0 switches one off.")
    if images.ndim != 4 or len(targets) != len(images):
        raise ValueError(f"There are {len(targets)} targets for images of {tuple(images.shape)}; (B, C, H, W) wanted.")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"Images must be uint8 or float, got {images.dtype}.")
    soft = soft_targets(targets, num_classes)
    if not (mixup or cutmix) or len(images) < 2:
        return images.clone(), soft

    count, (height, width) = len(images), images.shape[-2:]
    random = np.random.Generator(np.random.Philox(key=seed % (1 << 64)))
    partners = torch.from_numpy(random.permutation(count)).to(images.device)
    pasted = random.random(count) < (0.5 if mixup and cutmix else float(cutmix > 0))
    share = np.where(pasted, random.beta(cutmix or 1, cutmix or 1, count), random.beta(mixup or 1, mixup or 1, count))

    # The box keeps its whole size within the image; pixels are whole, so the labels follow the box, not the draw.
    tall, wide = (np.round(np.sqrt(1 - share) * side).astype(int) for side in (height, width))
    top = np.floor(random.random(count) * (height - tall + 1))
    left = np.floor(random.random(count) * (width - wide + 1))
    share = np.where(pasted, 1 - tall * wide / (height * width), share)

    others = images[partners]
    mixed = images.clone()
    blended = torch.from_numpy(np.flatnonzero(~pasted)).to(images.device)
    if len(blended):
        weight = torch.from_numpy(share).to(images.device, torch.float32)[blended, None, None, None]
        part = torch.lerp(others[blended].float(), images[blended].float(), weight)
        mixed[blended] = (part + 0.5).clamp_(0, 255).to(mixed.dtype) if mixed.dtype == torch.uint8 else part.to(mixed)
    boxes = np.stack([top, top + tall, left, left + wide], 1).astype(int).tolist()
    for place in np.flatnonzero(pasted).tolist():
        y0, y1, x0, x1 = boxes[place]
        mixed[place, :, y0:y1, x0:x1] = others[place, :, y0:y1, x0:x1]
    kept = torch.from_numpy(share).to(soft).reshape(-1, *[1] * (soft.ndim - 1))
    return mixed, kept * soft + (1 - kept) * soft[partners]


def soft_targets(targets: Tensor, num_classes: int | None) -> Tensor:
    """Targets as float32 that can be mixed; see :func:`mix_batch`.

    Raises:
        ValueError: If they are of another shape or out of their domain.
    """
    if targets.ndim > 2 or targets.ndim == 0:
        raise ValueError(
            f"Targets of the shape {tuple(targets.shape)} cannot be mixed: mixup and cutmix need one label a sample,"
            " (B,), or a row of them, (B, C). For masks and boxes switch mixing off."
        )
    if targets.is_floating_point() or (targets.ndim == 2 and targets.shape[1] > 1):
        if len(targets) and not (float(targets.min()) >= 0 and float(targets.max()) <= 1):
            raise ValueError(
                "Targets that are floats or rows must lie within 0 and 1, as probabilities or yes and no do; mixup and"
                " cutmix are for classification."
            )
        return targets.float()
    if num_classes is None:
        raise ValueError("Pass num_classes: class indices become rows of so many probabilities.")
    flat = targets.reshape(-1).long()
    if len(flat) and (int(flat.min()) < 0 or int(flat.max()) >= num_classes):
        raise ValueError(
            f"There are class indices from {int(flat.min())} to {int(flat.max())}, but num_classes={num_classes}."
        )
    return F.one_hot(flat, num_classes).float()
