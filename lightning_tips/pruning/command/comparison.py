"""A network beside its pruned self: what both cost, measured in turns, as table and page.

Pure functions on torch objects.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_tips.core import render_table
from lightning_tips.pruning.fit.capture import Inputs
from lightning_tips.pruning.fit.latency import of_size
from lightning_tips.pruning.networks.layers import channels_of
from lightning_tips.pruning.networks.measure import count_cost, measure_latencies, peak_memory

Row = tuple[str, str, str, str]


def layer_channels(before: nn.Module, after: nn.Module) -> dict[str, list[int]]:
    """Output channels of each convolution before and after; 0 where a removed block took the layer with it."""
    left = dict(after.named_modules())
    return {
        name: [channels_of(layer), channels_of(left[name]) if isinstance(left.get(name), _ConvNd) else 0]
        for name, layer in before.named_modules()
        if isinstance(layer, _ConvNd)
    }


def compare_networks(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Inputs,
    batch_sizes: Sequence[int] = (1, 256),
    repeats: int = 30,
) -> dict[str, Any]:
    """Counts and measures two networks on the same inputs.

    Args:
        before: The whole network.
        after: The pruned one, on the same device. Both stay as they are.
        example_inputs: Arguments of a call: a tuple, or a dict by name, of any batch size.
        batch_sizes: For which time and memory are measured; samples are repeated.
        repeats: Measured passes of each network and size, in turns and in random order.

    Returns:
        Plain data. ``cost``: by kind (``macs`` of one sample, ``parameters``, ``filters``, ``file_bytes`` of the
        weights alone) the numbers before and after. ``measured``: for each batch size seconds (``median``, ``low`` and
        ``high``: quartiles) before and after, ``ratio`` of the medians, ``peak_bytes`` of a pass before and after (none
        on devices that count nothing), ``device``, ``threads``, ``repeats``. ``channels``: by layer.
    """
    one = of_size(example_inputs, 1)
    pair = [count_cost(network, one).to_dict() for network in (before, after)]
    cost: dict[str, list[int]] = {kind: [costs[kind] for costs in pair] for kind in pair[0]}
    cost["file_bytes"] = [_file_bytes(network) for network in (before, after)]
    measured = []
    for size in batch_sizes:
        inputs = of_size(example_inputs, size)
        old, new = measure_latencies([before, after], inputs, repeats)
        row: dict[str, Any] = {"batch_size": size, "device": old.device, "threads": old.threads, "repeats": repeats}
        for name, latency in (("before", old), ("after", new)):
            row[name] = dict(zip(("median", "low", "high"), (latency.median, *latency.quartiles), strict=True))
        row["ratio"] = new.median / old.median
        if torch.device(old.device).type in ("cpu", "cuda"):
            row["peak_bytes"] = [peak_memory(network, inputs) for network in (before, after)]
        measured.append(row)
    return {"cost": cost, "measured": measured, "channels": layer_channels(before, after)}


def _file_bytes(network: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.getbuffer().nbytes


def comparison_rows(comparison: Mapping[str, Any], metrics: Mapping[str, Sequence[float]]) -> list[Row]:
    """Lines of a table: what, before, after, and what is left of it.

    Args:
        comparison: From :func:`compare_networks`.
        metrics: By name, before and after.
    """
    names = {"macs": "MACs of one sample", "file_bytes": "file of the weights"}
    rows: list[Row] = []
    for kind, (old, new) in comparison["cost"].items():
        shown = [_bytes(v) if kind == "file_bytes" else f"{v:,}" for v in (old, new)]
        rows.append((names.get(kind, kind), shown[0], shown[1], _share(new, old)))
    for row in comparison["measured"]:
        at = f"batch {row['batch_size']}"
        times = [_time(**row[name]) for name in ("before", "after")]
        rows.append((f"time, {at}", times[0], times[1], f"{row['ratio']:.1%}"))
        if "peak_bytes" in row:
            old, new = row["peak_bytes"]
            rows.append((f"peak memory, {at}", _bytes(old), _bytes(new), _share(new, old)))
    rows += [(name, f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}") for name, (old, new) in metrics.items()]
    return rows


def _share(new: float, old: float) -> str:
    return f"{new / old:.1%}" if old else "-"


def _bytes(number: float) -> str:
    units = ["B", "kB", "MB", "GB"]
    while number >= 1000 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:.0f} B" if units[0] == "B" else f"{number:.1f} {units[0]}"


def _time(median: float, low: float, high: float) -> str:
    scale, unit = (1e6, "us") if median < 1e-3 else (1e3, "ms") if median < 1 else (1.0, "s")
    return f"{median * scale:.3g} {unit} ({low * scale:.3g} to {high * scale:.3g})"


STEP_COLUMNS = ("what", "epoch", "step")


def step_rows(steps: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and lines of a table of what was done, step by step.

    Args:
        steps: Each with ``step``, ``epoch``, ``what``, ``details`` and ``fine_tuned``: the metrics after the
            fine-tuning that followed.
    """
    shares = [k for k in ("macs", "params", "filters", "latency") if any(k in s["details"] for s in steps)]
    metrics = list(dict.fromkeys(name for s in steps for name in s["fine_tuned"]))
    columns = (*STEP_COLUMNS, *shares, *(f"{name} after" for name in metrics))
    rows = []
    for s in steps:
        left = [f"{s['details'][k]:.1%}" if k in s["details"] else "" for k in shares]
        then = [f"{s['fine_tuned'][k]:.4f}" if k in s["fine_tuned"] else "" for k in metrics]
        rows.append((s["what"], str(s["epoch"]), str(s["step"]), *left, *then))
    return columns, rows


def as_terminal(report: Mapping[str, Any]) -> str:
    """The tables of a report for a terminal."""
    rows = comparison_rows(report, report["metrics"])
    columns, steps = step_rows(report["steps"])
    steps = [(textwrap.shorten(what, 40, placeholder=" ..."), *others) for what, *others in steps]  # the page has all
    return (
        f"Before and after\n{render_table(('', 'before', 'after', 'left'), rows)}\n"
        f"Step by step\n{render_table(columns, steps)}"
    )


def as_page(report: Mapping[str, Any]) -> str:
    """A report as Markdown."""
    columns, steps = step_rows(report["steps"])
    device = report["measured"][0] if report["measured"] else None
    parts = [
        f"# {report['title']}",
        "\n".join(f"- {name}: {value}" for name, value in report["run"].items()),
        "## Before and after",
        _markdown(("", "before", "after", "left"), comparison_rows(report, report["metrics"])),
    ]
    if device:
        parts.append(
            f"Times: median (quartiles) of {device['repeats']} forward passes on {device['device']}, with"
            f" {device['threads']} threads, both networks in turns and in random order. Peak memory: what a forward"
            " pass holds at once beside weights and inputs."
        )
    note = "Shares are of the network before the first step of the callback that made it."
    parts += ["## Step by step", _markdown(columns, steps), note, "## Channels", "![Channels by layer](channels.png)"]
    channels = [(n, str(old), str(new), _share(new, old)) for n, (old, new) in report["channels"].items()]
    parts.append(_markdown(("layer", "before", "after", "left"), channels))
    if report["left_out"]:
        parts += ["## Left as it was", _markdown(("layer", "why"), list(report["left_out"].items()))]
    parts += ["## Files", _markdown(("file", ""), list(report["files"].items()))]
    return "\n\n".join(parts) + "\n"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
