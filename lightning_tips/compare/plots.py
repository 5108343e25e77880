"""The pictures of a comparison."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["INK", "color_of", "plot_cost", "plot_curves", "plot_differences", "svg_of", "tint_of"]

INK = {"better": "#1f7a5a", "worse": "#b3452f", "none": "#5f6b7a", "reference": "#20262e"}
"""By verdict."""
_CYCLE = ["#3b6fb6", "#d1802f", "#4a9a62", "#9a5bb0", "#b84a62", "#7d6b4f", "#3d9ca8", "#a8a03d", "#d873a6", "#6d7fd1"]


def color_of(verdict: str) -> str:
    """The colour of a verdict: only what is sure is green or red."""
    return INK[verdict if verdict in INK else "better" if verdict.startswith("better, by") else "none"]


def tint_of(index: int) -> str:
    """The colour of a curve; the reference's is dark."""
    return INK["reference"] if index == 0 else _CYCLE[(index - 1) % len(_CYCLE)]


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#c3cad3")
    axis.tick_params(colors="#4a5563", labelsize=8.5)
    axis.grid(color="#e8ebef", linewidth=0.8)
    axis.set_axisbelow(True)
    return figure, axis


def plot_curves(result: Mapping[str, Any]) -> Figure:
    """The metric over epochs: of each arm the mean over its seeds."""
    figure, axis = _figure(6.4, 2.5)
    for index, row in enumerate(result["arms"]):
        if row["curve"]:
            epochs, values = zip(*row["curve"], strict=True)
            style = {"linewidth": 2.0, "zorder": 3} if index == 0 else {"linewidth": 1.4}
            axis.plot(epochs, values, color=tint_of(index), label=row["name"], marker=".", markersize=4, **style)
    axis.set_xlabel("epoch", fontsize=9, color="#4a5563")
    axis.set_ylabel(result["monitor"], fontsize=9, color="#4a5563")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _zoom(axis, result)
    return figure


def _zoom(axis: Any, result: Mapping[str, Any]) -> None:
    """What differs is at the end; the first epochs, far away, may leave the picture."""
    values = [[v for _, v in row["curve"]] for row in result["arms"] if row["curve"]]
    late = [v for row in values for v in row[len(row) // 4 :]]
    if len(late) > 3 and max(late) > min(late):
        room = 0.06 * (max(late) - min(late))
        axis.set_ylim(min(late) - room, max(late) + room)


def plot_cost(result: Mapping[str, Any]) -> Figure:
    """Score against training time: a point for each fit, a ring for each arm's mean."""
    figure, axis = _figure(6.4, 2.5)
    for index, row in enumerate(result["arms"]):
        time, mean = row["cost"]["seconds"]["mean"], row["mean"]
        if time is None or mean is None:
            continue
        color = tint_of(index)
        spread = (row["sd"] or 0, row["cost"]["seconds"]["sd"] or 0)
        axis.errorbar(time, mean, spread[0], spread[1], color=color, linewidth=1, alpha=0.5, zorder=2)
        axis.plot(time, mean, "o", color=color, markersize=7, markeredgecolor="white", label=row["name"], zorder=3)
    axis.set_xlabel("seconds of training", fontsize=9, color="#4a5563")
    axis.set_ylabel(f"{result['monitor']}, mean ± sd", fontsize=9, color="#4a5563")
    axis.set_xlim(left=0)
    return figure


def plot_differences(result: Mapping[str, Any]) -> Figure:
    """Differences to the reference with their intervals, a row for each arm; points are seeds."""
    rows = [row for row in result["arms"] if row["difference"] is not None]
    figure, axis = _figure(7, 1.2 + 0.4 * max(len(rows), 1))
    reach = axis_reach(result)
    for place, row in enumerate(rows):
        difference, color = row["difference"], color_of(row["verdict"])
        axis.plot(list(difference["pairs"].values()), [place] * len(difference["pairs"]), "|", color=color, alpha=0.6)
        if difference["low"] is not None:
            axis.plot([difference["low"], difference["high"]], [place, place], color=color, linewidth=2)
        if difference["mean"] is not None:
            axis.plot(difference["mean"], place, "o", color=color)
    axis.axvline(0, color="#20262e", linewidth=0.8)
    axis.set_xlim(-reach, reach)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(
        f"{result['monitor']} minus that of {result['reference']}, {result['level']:.0%} interval", fontsize=9
    )
    return figure


def axis_reach(result: Mapping[str, Any]) -> float:
    """Half the width of the axis of differences: all pairs fit in, and intervals that are not huge beside them."""
    found = [row["difference"] for row in result["arms"] if row["difference"] is not None]
    pairs = [abs(value) for d in found for value in d["pairs"].values()]
    most = max(pairs, default=0.0)
    ends = [abs(end) for d in found for end in (d["low"], d["high"]) if end is not None]
    return 1.1 * min(max([most, *ends]), 3 * most) or 1.0


def svg_of(figure: Figure) -> str:
    """A figure as SVG, the same for the same figure."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "compare", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    text = file.getvalue()
    return text[text.index("<svg") :]
