"""The plot of a run: its metrics, with the tips' events marked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_tips.core.events import Event

_ABOVE = 4  # events whose names have room above the plot


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
    axes[-1].set_xlabel("epochs trained")
    _mark_events(figure, list(axes), sorted(events, key=lambda event: event.step), epochs_a_step)
    figure.savefig(path, dpi=120)


def _mark_events(figure: Figure, axes: list[Axes], events: list[Event], epochs_a_step: float) -> None:
    """A line for each event; what it was stands above it or, where that would be crowded, in a list below."""
    places: dict[float, list[int]] = {}
    for number, event in enumerate(events, 1):
        places.setdefault(event.step * epochs_a_step, []).append(number)
    crowded = len(events) > _ABOVE or len(places) < len(events)
    for place, numbers in places.items():
        for axis in axes:
            axis.axvline(place, color="black", linewidth=1, linestyle=":")
        first = events[numbers[0] - 1]
        axes[0].annotate(
            _span(numbers) if crowded else f"{first.tip}: {first.what}",
            (place, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 2),
            textcoords="offset points",
            fontsize="small",
            rotation=0 if crowded else 20,
        )
    if crowded:
        lines = [f"{n}  epoch {e.epoch}, {e.tip}: {e.what}" for n, e in enumerate(events, 1)]
        half = -(-len(lines) // 2)
        figure.set_figheight(figure.get_figheight() + 0.2 * half + 0.2)
        for column, part in enumerate((lines[:half], lines[half:])):
            axes[-1].annotate(
                "\n".join(part),
                (0.5 * column, 0),
                xycoords="axes fraction",
                xytext=(0, -38),
                textcoords="offset points",
                fontsize="small",
                verticalalignment="top",
            )


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
