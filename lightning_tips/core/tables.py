"""The two tables that a run shows: what the tips will do, and what they did."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from torch import nn

if TYPE_CHECKING:
    from lightning_tips.core.tip import Tip


def plan_table(tips: Sequence[Tip], module: nn.Module) -> str:
    """Which tips act, in which order, with what parameters."""
    total = sum(p.numel() for p in module.parameters())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    table = Table()
    table.add_column("")
    table.add_column("tip", no_wrap=True)
    table.add_column("plan")
    for number, tip in enumerate(tips, 1):
        table.add_row(str(number), type(tip).__name__, tip.describe())
    share = f" ({trainable / total:.0%})" if total else ""
    caption = f"{trainable:,} of {total:,} parameters train{share}"
    return f"Tips in the order in which they act\n{_render(table)}\n{caption}"


def event_table(tips: Sequence[Tip]) -> str:
    """What each tip did and when; a tip that did nothing says what it waited for."""
    table = Table()
    for column in ("tip", "epoch", "step"):
        table.add_column(column, no_wrap=True)
    table.add_column("event")
    table.add_column("details")
    rows: list[tuple[int, tuple[str, ...]]] = []
    for tip in tips:
        name = type(tip).__name__
        for event in tip.events:
            details = ", ".join(f"{key} {_number(value)}" for key, value in event.details.items())
            rows.append((event.step, (name, str(event.epoch), str(event.step), event.what, details)))
        if not tip.events:
            rows.append((0, (name, "-", "-", "", tip.outlook())))
    for _, cells in sorted(rows, key=lambda row: row[0]):
        table.add_row(*cells)
    return f"What the tips did\n{_render(table)}"


def _render(table: Table) -> str:
    # Rendered to a string, so that one print brings it past any progress bar, on one rank.
    console = Console(file=io.StringIO(), width=max(80, min(Console().width, 140)))
    console.print(table, markup=False)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
