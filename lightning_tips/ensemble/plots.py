"""Pictures of an ensemble: whether its probabilities hold, and who has how much to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from lightning_tips.ensemble.calibration import Reliability
from lightning_tips.ensemble.checks import as_weights

__all__ = ["plot_reliability", "plot_weights"]

FEW = 5


def plot_reliability(curves: Mapping[str, Reliability], path: Path) -> None:
    """A reliability diagram: accuracy over confidence, and below it how many samples have that confidence.

    Bins with less than 5 or a thousandth of the samples are in the lower part only: their accuracy is noise.

    Args:
        curves: By name, such as ``{"vote": ..., "at temperature 0.8": ...}``; the legend adds the calibration error.
        path: The PNG to write.

    Raises:
        ValueError: There are no curves.
    """
    if not curves:
        raise ValueError("There is nothing to draw.")
    figure = Figure(figsize=(5.0, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="0.65", linestyle=":", label="as sure as right")
    for name, curve in curves.items():
        counts = curve.counts.numpy()
        here = counts >= max(FEW, counts.sum() / 1000)
        if not here.any():
            here = counts > 0
        (line,) = upper.plot(
            curve.confidence.numpy()[here],
            curve.accuracy.numpy()[here],
            marker=".",
            label=f"{name} (error {100 * curve.error:.2f} %)",
        )
        lower.stairs(counts / counts.sum(), curve.edges.numpy(), color=line.get_color())
    upper.set_ylabel("accuracy")
    upper.set_ylim(0, 1.02)
    upper.legend(loc="best", fontsize="small", framealpha=0.8, edgecolor="none")
    upper.grid(alpha=0.3)
    lower.set_xlabel("confidence")
    lower.set_ylabel("share of samples")
    lower.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    lower.set_xlim(0, 1)
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def plot_weights(
    weights: Sequence[float] | Tensor,
    path: Path,
    names: Sequence[str] = (),
    scores: Sequence[float] | None = None,
    score_name: str = "held-out accuracy",
) -> None:
    """The weights of the members as bars; those of no weight are named too.

    Args:
        weights: ``(M,)``, in any unit.
        path: The PNG to write.
        names: Of the members; their numbers where there is none.
        scores: Of each member, drawn beside the weights.
        score_name: What they are.

    Raises:
        ValueError: Weights or scores do not fit.
    """
    shares = as_weights(weights, len(weights)).numpy()
    if scores is not None and len(scores) != len(shares):
        raise ValueError(f"{len(scores)} scores do not fit {len(shares)} members.")
    labels = [str(names[i]) if i < len(names) else f"member {i}" for i in range(len(shares))]
    panels = 1 if scores is None else 2
    size = (1.5 + 3.6 * panels, min(1.2 + 0.36 * len(shares), 14.0))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    places = np.arange(len(shares))
    bars = axes[0].barh(places, shares, 0.7, color="tab:blue")
    if len(shares) <= 40:
        axes[0].set_yticks(places, labels)
        axes[0].bar_label(bars, [f"{100 * share:.0f} %" for share in shares], padding=3, fontsize=8)
    axes[0].axvline(1 / len(shares), color="0.4", linestyle=":", linewidth=1, label="all the same")
    axes[0].set_xlim(0, max(1.18 * shares.max(), 1.5 / len(shares)))
    axes[0].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0].set_xlabel("weight in the vote")
    axes[0].invert_yaxis()  # the first member on top
    if scores is not None:
        axes[1].plot(scores, places, "o", color="0.35")
        axes[1].set_xlabel(score_name)
        axes[1].xaxis.set_major_locator(MaxNLocator(5))
        axes[1].grid(alpha=0.3, axis="x")
    figure.legend(loc="outside upper left", fontsize="small", frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
