"""What pruning leaves for people to look at: the channels of each layer, before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_tips.core import Event, log_picture, render_table, report_folder, say

MOST_ROWS = 30  # layers that the table names
NAMES = {"macs": "MACs of one sample", "latency": "latency, s"}


def write_report(
    trainer: pl.Trainer,
    channels: Mapping[str, Sequence[int]],
    left_out: Mapping[str, str],
    reference: Mapping[str, float],
    cost: Mapping[str, float],
    events: Sequence[Event],
) -> None:
    """Prints a table and writes ``pruning.png`` and ``pruning.json`` to the run's folder, from rank 0.

    Args:
        trainer: The trainer.
        channels: By layer, the number of output channels before the first step and now.
        left_out: Layers that could not be pruned, and why.
        reference: Cost of the unpruned network, by kind; operations are those of one sample.
        cost: Cost now.
        events: What was done.
    """
    say(trainer, channel_table(channels, reference, cost))
    folder = report_folder(trainer)
    report = {
        "channels": {name: list(pair) for name, pair in channels.items()},
        "left_out": dict(left_out),
        "before": dict(reference),
        "after": dict(cost),
        "events": [event.to_dict() for event in events],
    }
    (folder / "pruning.json").write_text(json.dumps(report, indent=2) + "\n")
    plot_channels(channels, folder / "pruning.png")
    log_picture(trainer, "tips/pruning", folder / "pruning.png")


def cost_rows(reference: Mapping[str, float], cost: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """Rows of a table: what, before, after, share that is left."""
    return [
        (NAMES.get(name, name), _number(reference[name]), _number(left), f"{left / reference[name]:.1%}")
        for name, left in cost.items()
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"  # operations, but also seconds


def channel_table(
    channels: Mapping[str, Sequence[int]], reference: Mapping[str, float], cost: Mapping[str, float]
) -> str:
    """Cost and channels before and after, for a terminal; of many layers those that lost the largest shares."""
    rows = cost_rows(reference, cost)
    layers = list(channels)
    title = "The network before and after pruning"
    if len(layers) > MOST_ROWS:
        lowest = sorted(layers, key=lambda name: channels[name][1] / channels[name][0])[:MOST_ROWS]
        title += f" ({len(layers) - MOST_ROWS} layers that lost less are left out)"
        layers = [name for name in layers if name in lowest]
    for name in layers:
        before, after = channels[name]
        rows.append((name, str(before), str(after), f"{after / before:.1%}"))
    return f"{title}\n{render_table(('', 'before', 'after', 'left'), rows)}"


def plot_channels(channels: Mapping[str, Sequence[int]], path: Path) -> None:
    """Draws the output channels of each layer before and after.

    Args:
        channels: By layer, the numbers before and after.
        path: The PNG to write.
    """
    names = list(channels)
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    places = range(len(names))
    axis.barh(places, [channels[name][0] for name in names], color="lightgray", label="before")
    axis.barh(places, [channels[name][1] for name in names], color="tab:blue", label="after")
    axis.set_yticks(places, names, fontsize="small")
    axis.invert_yaxis()
    axis.set_xlabel("output channels")
    axis.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=120)
