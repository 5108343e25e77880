"""The digits as images of bytes, and how the same image looks once more."""

import numpy as np
import torch
from sklearn.datasets import load_digits

DIGITS = load_digits()
IMAGES = torch.from_numpy(np.round(DIGITS.images * 255 / 16).astype(np.uint8))[:, None]
LABELS = torch.from_numpy(DIGITS.target)


def noisy(images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.float() * 0.8 + 20 + 5 * noise).clamp(0, 255).round().to(torch.uint8)
