"""The two tables that a run shows: what the tips will do, and what they did."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_tips.core.events import Event


def plan_table(plans: Sequence[tuple[str, str]], module: nn.Module) -> str:
    """Which tips act, in which order, with what parameters.

    Args:
        plans: Name and plan of each tip.
        module: The module, for the share of its parameters that train.
    """
    total = sum(p.numel() for p in module.parameters())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    table = Table()
    table.add_column("")
    table.add_column("tip", no_wrap=True)
    table.add_column("plan")
    for number, (name, plan) in enumerate(plans, 1):
        table.add_row(str(number), name, plan)
    share = f" ({100 * trainable / total:.3g} %)" if total else ""
    caption = f"{trainable:,} of {total:,} parameters train{share}"
    return f"Tips in the order in which they act\n{_render(table)}\n{caption}"


def event_table(done: Sequence[tuple[str, Sequence[Event], str]]) -> str:
    """What each tip did and when.

    Args:
        done: Name and events of each tip, and what it says when there are none.
    """
    table = Table()
    for column in ("tip", "epoch", "step"):
        table.add_column(column, no_wrap=True)
    table.add_column("event")
    table.add_column("details")
    rows: list[tuple[int, tuple[str, ...]]] = []
    for name, events, outlook in done:
        for event in events:
            details = ", ".join(f"{key} {_number(value)}" for key, value in event.details.items())
            rows.append((event.step, (name, str(event.epoch), str(event.step), event.what, details)))
        if not events:
            rows.append((0, (name, "-", "-", "", outlook)))
    for _, cells in sorted(rows, key=lambda row: row[0]):
        table.add_row(*cells)
    return f"What the tips did\n{_render(table)}"


def render_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first column to the left, numbers in the others to the right; nothing cut off."""
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    whole = Console(file=io.StringIO(), width=10_000).measure(table).maximum
    return _render(table, least=whole)  # numbers that are cut off tell nothing; a narrow terminal wraps them


def _render(table: Table, least: int = 80) -> str:
    # Rendered to a string, so that one print brings it past any progress bar, on one rank.
    console = Console(file=io.StringIO(), width=max(least, min(Console().width, 140)))
    console.print(table, markup=False)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
