"""What the user sees of pseudo-labels: table, file and plot of how many each class got, and how many are right."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lightning_tips.core import log_picture, render_table, report_folder, say

NEARLY_ALL, NEARLY_NONE = 0.98, 0.01  # shares of the unlabelled samples that are accepted
MOST_ROWS = 20
"""Classes that the table names; of more, those with the most pseudo-labels."""


@dataclass(frozen=True)
class Round:
    """One round of labelling.

    Attributes:
        epoch: Before which it was.
        counts: Pseudo-labels of each class.
        right: How many of them are right; None where that was not asked for.
        labelled: Labelled samples of each class.
        unlabelled: Samples that could have got a label.
    """

    epoch: int
    counts: list[int]
    right: list[int] | None
    labelled: list[int]
    unlabelled: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Round:
        """The inverse of :meth:`to_dict`."""
        return cls(**{field.name: data[field.name] for field in fields(cls)})


def show_rounds(trainer: pl.Trainer, rounds: Sequence[Round], names: Sequence[str]) -> None:
    """Prints the last round by class, and leaves all of them as ``pseudo_labels.csv`` and ``pseudo_labels.png``.

    Args:
        trainer: The trainer; only rank 0 shows anything.
        rounds: At least one.
        names: Names of the classes, as far as they are known.
    """
    if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return
    last = rounds[-1]
    labels = [str(names[c]) if c < len(names) else str(c) for c in range(len(last.counts))]
    say(trainer, rounds_table(last, labels))
    folder = report_folder(trainer)
    with (folder / "pseudo_labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["round", "epoch", "class", "labelled", "pseudo_labels", "right"])
        for number, one in enumerate(rounds, 1):
            for c, count in enumerate(one.counts):
                right = "" if one.right is None else one.right[c]
                writer.writerow([number, one.epoch, labels[c], one.labelled[c], count, right])
    plot_rounds(rounds, labels, folder / "pseudo_labels.png")
    log_picture(trainer, "tips/pseudo_labels", folder / "pseudo_labels.png")


def rounds_table(last: Round, labels: Sequence[str]) -> str:
    """The table of a round, for a terminal."""
    shown = np.argsort(-np.asarray(last.counts), kind="stable")[:MOST_ROWS].tolist()
    rows = []
    for c in sorted(shown):
        row = [labels[c], f"{last.labelled[c]:,}", f"{last.counts[c]:,}"]
        if last.right is not None:
            row.append(f"{100 * last.right[c] / last.counts[c]:.1f}" if last.counts[c] else "-")
        rows.append(row)
    columns = ["class", "labelled", "pseudo-labels"] + (["right %"] if last.right is not None else [])
    title = f"Pseudo-labels of the last round: {sum(last.counts):,} of {last.unlabelled:,} samples"
    left_out = len(last.counts) - len(shown)
    return f"{title}{f' ({left_out} classes left out)' if left_out > 0 else ''}\n{render_table(columns, rows)}"


def plot_rounds(rounds: Sequence[Round], labels: Sequence[str], path: Path) -> None:
    """The plot: shares of the classes among labelled samples and the last pseudo-labels; numbers over the rounds."""
    last = rounds[-1]
    figure = Figure(figsize=(min(max(9.0, 0.5 * len(labels) + 4.0), 18.0), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    places = np.arange(len(labels))
    for counts, shift, colour, what in (
        (last.labelled, -0.2, "0.65", "labelled samples"),
        (last.counts, 0.2, "tab:blue", "pseudo-labels of the last round"),
    ):
        left.bar(places + shift, 100 * np.asarray(counts) / max(sum(counts), 1), 0.4, color=colour, label=what)
    if len(labels) <= 40:
        long = max(map(len, labels)) > 3
        left.set_xticks(places, labels, rotation=45 if long else 0, ha="right" if long else "center")
    left.set_xlabel("class")
    left.set_ylabel("share, %")
    left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    epochs = [one.epoch for one in rounds]
    right.plot(epochs, [100 * sum(o.counts) / o.unlabelled for o in rounds], "o-", color="tab:blue", label="accepted")
    if all(one.right is not None for one in rounds):
        share = [100 * sum(o.right or []) / max(sum(o.counts), 1) for o in rounds]
        right.plot(epochs, share, "s-", color="tab:green", label="right among them")
    right.set_ylim(0, 102)
    right.set_xlabel("epoch")
    right.set_ylabel("%")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def warn_of_odd_labels(asker: str, counts: Tensor, labelled: Tensor, size: int, threshold: float) -> None:
    """Warns where nearly none, nearly all, or nearly only samples of one class have got a label.

    Args:
        asker: Who labels.
        counts: (C,) pseudo-labels of each class.
        labelled: (C,) labelled samples of each class.
        size: Samples that could have got a label.
        threshold: That they had to reach.
    """
    accepted = int(counts.sum())
    if accepted < max(1.0, NEARLY_NONE * size):
        rank_zero_warn(
            f"{asker}: only {accepted} of {size} unlabelled samples reach the threshold {threshold:g}. Lower it, start"
            " later, or take a better teacher."
        )
        return
    if accepted >= NEARLY_ALL * size and threshold > 1 / len(counts):
        rank_zero_warn(
            f"{asker}: {accepted} of {size} unlabelled samples reach the threshold {threshold:g}, so it tells nothing:"
            " the teacher is sure of everything, also of what it gets wrong. Raise the threshold, or keep the surest of"
            " each class with top_share."
        )
    largest, usual = float(counts.max() / accepted), float(labelled.max() / max(int(labelled.sum()), 1))
    if largest - usual > 0.5 or (largest > 0.8 and largest > 1.2 * usual):
        rank_zero_warn(
            f"{asker}: {largest:.0%} of the pseudo-labels are of class {int(counts.argmax())}; of the labelled samples"
            f" the largest class has {usual:.0%}. The teacher prefers that class, or the unlabelled data is of another"
            " kind. align=True and per_class help against the first."
        )
