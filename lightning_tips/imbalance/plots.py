"""What the user sees of the classes: counts before and after as a table and a plot, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_tips.core import leaves_files, log_picture, render_table, report_folder, say

MOST_ROWS = 20
"""Classes that the table names; of more than that, the largest and the smallest ones."""


def show_balance(
    trainer: pl.Trainer,
    counts: ArrayLike,
    seen: ArrayLike,
    what: str,
    names: Sequence[str] = (),
    picture: str = "class_balance",
) -> None:
    """Prints a table of the class counts before and after, and leaves it as a plot in the report's folder and W&B.

    Args:
        trainer: The trainer; only rank 0 shows anything.
        counts: Samples of each class ``(C,)`` in the training data.
        seen: What each class counts for in an epoch ``(C,)``: its draws, or its samples times its weight.
        what: What ``seen`` is, for the heading.
        names: Names of the classes.
        picture: File and logger name of the plot.
    """
    if not leaves_files(trainer):
        return
    before, after = np.asarray(counts, float), np.asarray(seen, float)
    labels = [str(names[c]) if c < len(names) else str(c) for c in range(len(before))]
    say(trainer, balance_table(before, after, what, labels))
    path = report_folder(trainer) / f"{picture}.png"
    plot_balance(before, after, what, labels, path)
    log_picture(trainer, f"tips/{picture}", path)


def balance_table(before: Any, after: Any, what: str, labels: Sequence[str]) -> str:
    """The table, for a terminal."""
    shown = list(range(len(before)))
    left_out = len(before) - MOST_ROWS
    if left_out > 0:
        by_size = np.argsort(-before, kind="stable").tolist()
        shown = sorted([*by_size[: MOST_ROWS // 2], *by_size[-MOST_ROWS // 2 :]])
    old, new = before / before.sum(), after / after.sum()
    rows = [(labels[c], f"{before[c]:,.0f}", f"{old[c]:.2%}", f"{after[c]:,.0f}", f"{new[c]:.2%}") for c in shown]
    title = "Class balance of the training data"
    title += f" ({left_out} classes in between left out)" if left_out > 0 else ""
    return f"{title}\n{render_table(('class', 'samples', 'share', what, 'share'), rows)}"


def plot_balance(before: Any, after: Any, what: str, labels: Sequence[str], path: Path) -> None:
    """The plot: two bars for each class, on a logarithmic axis where the counts differ by more than 20 times."""
    figure = Figure(figsize=(min(max(6.0, 0.55 * len(before)), 18.0), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    places = np.arange(len(before))
    axis.bar(places - 0.2, before, 0.4, label="samples in the training data", color="0.65")
    axis.bar(places + 0.2, after, 0.4, label=what, color="tab:blue")
    positive = np.concatenate([before, after])
    positive = positive[positive > 0]
    if positive.max() > 20 * positive.min():
        axis.set_yscale("log")
    if len(labels) <= 40:
        long = max(map(len, labels)) > 3
        axis.set_xticks(places, labels, rotation=45 if long else 0, ha="right" if long else "center")
    axis.set_xlabel("class")
    axis.set_ylabel("samples an epoch")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def plot_confusion(confusion: Tensor, labels: Sequence[str], path: Path) -> None:
    """The confusion matrix, each row as shares of its class.

    Args:
        confusion: (C, C) counts, true classes in rows.
        labels: Names of the classes.
        path: The PNG to write.
    """
    counts = confusion.double().numpy()
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    classes = len(counts)
    side = min(max(4.0, 0.5 * classes + 1.5), 14.0)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    image = axis.imshow(shares, vmin=0.0, vmax=1.0, cmap="Blues")
    figure.colorbar(image, ax=axis, shrink=0.8, label="share of the true class")
    if classes <= 20:
        for row in range(classes):
            for column in range(classes):
                dark = shares[row, column] > 0.5
                text = f"{100 * shares[row, column]:.0f}"
                axis.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "0.3")
    if classes <= 40:
        axis.set_xticks(range(classes), labels, rotation=45, ha="right")
        axis.set_yticks(range(classes), [f"{label} ({int(n)})" for label, n in zip(labels, totals[:, 0], strict=True)])
    axis.set_xlabel("predicted")
    axis.set_ylabel("true (samples)")
    figure.savefig(path, dpi=110)
