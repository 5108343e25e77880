"""The contact sheet: what the augmentation shows the network, beside what the data shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["changing_first", "contact_sheet"]


def contact_sheet(
    clean: Tensor,
    augmented: Sequence[Tensor],
    labels: Sequence[str],
    path: Path,
    value_range: tuple[float, float] = (0.0, 1.0),
    titles: Sequence[str] = (),
) -> None:
    """Draws images beside their augmented forms, a row for each image.

    Args:
        clean: (N, C, H, W) uint8, or float within ``value_range``. Of other than three channels the first is shown.
        augmented: Each like ``clean``: the same images in one more form.
        labels: (N,) what stands beside each row.
        path: The PNG to write.
        value_range: Darkest and brightest value of float images.
        titles: What stands above each column of ``augmented``.
    """
    columns = [clean, *augmented]
    height, width = clean.shape[-2:]
    gap = max(1, max(height, width) // 16)
    sheet = np.ones((len(clean) * (height + gap) - gap, len(columns) * (width + gap) - gap, 3), np.float32)
    for row in range(len(clean)):
        for column, images in enumerate(columns):
            top, left = row * (height + gap), column * (width + gap)
            sheet[top : top + height, left : left + width] = _picture(images[row], value_range)
    share = height / width
    figure = Figure(figsize=(1.3 * len(columns) + 0.8, 1.3 * share * len(clean) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()  # one for all: axes cost more than what is in them
    axis.imshow(sheet, interpolation="nearest", aspect="equal")
    heads = ["as it is", *titles]
    axis.set_xticks([n * (width + gap) + width / 2 for n in range(len(heads))], heads, fontsize="small")
    axis.set_yticks([n * (height + gap) + height / 2 for n in range(len(labels))], labels, fontsize="small")
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=100, bbox_inches="tight")  # long labels would be cut off


def _picture(image: Tensor, value_range: tuple[float, float]) -> NDArray[np.float32]:
    low, high = (0.0, 255.0) if image.dtype == torch.uint8 else value_range
    scaled = ((image.detach().cpu().float() - low) / (high - low)).clamp(0, 1)
    shown = scaled.permute(1, 2, 0) if len(scaled) == 3 else scaled[0]
    return np.broadcast_to(shown.numpy().reshape(*shown.shape[:2], -1), (*shown.shape[:2], 3))


def changing_first(changes: Sequence[bool], shown: int) -> list[int]:
    """Which rows of a batch to show: those that change come before others, of which a quarter is kept if there are.

    Args:
        changes: For each row, whether augmentation changes it.
        shown: How many to show at most.
    """
    order = sorted(range(len(changes)), key=lambda row: not changes[row])
    changing, others = order[: sum(changes)], order[sum(changes) :]
    few = others[: max(shown // 4, shown - len(changing))]
    return [*changing[: shown - len(few)], *few]
