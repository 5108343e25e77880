"""The plot of a run: its metrics, with the tips' events marked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_tips.core.events import Event


def plot_run(rows: list[dict[str, float]], events: list[Event], path: Path, metrics: list[str] | None = None) -> None:
    """Draws metrics over epochs, with a vertical line for each event.

    Args:
        rows: One dict for each validation or epoch end, with ``epoch``, ``step`` and metrics.
        events: What to mark.
        path: The PNG to write.
        metrics: What to draw; by default losses, metrics within [0, 1] and learning rates (keys ``lr/...``).
    """
    names = [n for n in dict.fromkeys(key for row in rows for key in row) if n not in ("epoch", "step")]
    names = [n for n in names if metrics is None or n in metrics]
    names = [n for n in names if any(math.isfinite(row.get(n, math.nan)) for row in rows)]
    rates = [n for n in names if n.startswith("lr/")]
    losses = [n for n in names if "loss" in n.lower()]
    others = [n for n in names if n not in rates + losses and ("/" not in n or metrics is not None)]
    if metrics is None:
        others = [n for n in others if all(0 <= row[n] <= 1 for row in rows if n in row)]
    panels = {
        "loss": losses,
        "metrics": others,
        "learning rate": rates,
    }
    panels = {title: curves for title, curves in panels.items() if curves}

    # Steps on one epoch axis: the position of a row is the share of all steps, scaled to epochs.
    last = rows[-1]
    epochs_a_step = (last["epoch"] + 1) / last["step"] if last["step"] else 1.0
    figure = Figure(figsize=(9, 1 + 2.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(len(panels), 1), sharex=True, squeeze=False)[:, 0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        seen: list[float] = []
        for name in curves:
            known = [row for row in rows if math.isfinite(row.get(name, math.nan))]
            points = [(row["step"] * epochs_a_step, row[name]) for row in known]
            style: dict[str, Any] = {"linestyle": "--"} if name.startswith("train") else {}
            if title == "learning rate":
                style = {"drawstyle": "steps-pre"}  # a row tells the rate with which its epoch ended
            axis.plot(*zip(*points, strict=True), label=name, marker=".", **style)
            seen += [value for _, value in points]
        # What happens late in a run is small beside its start.
        if title != "metrics" and seen and min(seen) > 0 and max(seen) > 10 * min(seen):
            axis.set_yscale("log")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.legend(loc="best", fontsize="small")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for event in events:
        for axis in axes:
            axis.axvline(event.step * epochs_a_step, color="black", linewidth=1, linestyle=":")
        axes[0].annotate(
            f"{event.tip}: {event.what}",
            (event.step * epochs_a_step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 2),
            textcoords="offset points",
            fontsize="small",
            rotation=20,
        )
    axes[-1].set_xlabel("epochs trained")
    figure.savefig(path, dpi=120)
