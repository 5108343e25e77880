"""The table of a comparison: the same cells in the terminal, in CSV and on the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from lightning_tips.core import render_table

__all__ = ["arm_csv", "as_terminal", "cells", "fit_csv", "number"]

COLUMNS = {
    "seconds": "training",
    "step_seconds": "step",
    "parameters": "parameters",
    "macs": "MACs",
    "latency_seconds": "latency",
    "peak_megabytes": "peak memory",
}


def number(value: float | None, digits: int = 4) -> str:
    """A score or a difference of scores; a dash if there is none."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 90:
        return f"{seconds / 60:.1f} min"
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    return f"{seconds * scale:.3g} {unit}"


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f}"


def cost_cells(row: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """By kind of cost: its value, and how it compares with the reference (``x1.02``), which is empty where alike."""
    shown = {}
    for kind in COLUMNS:
        cost = row["cost"][kind]
        form = _time if kind.endswith("seconds") else _count
        value = f"{cost['mean']:.0f} MB" if kind == "peak_megabytes" and cost["mean"] else form(cost["mean"])
        ratio = cost["ratio"]
        shown[kind] = (value, f"x{ratio:.2f}" if ratio is not None and abs(ratio - 1) >= 0.005 else "")
    return shown


def alike(result: Mapping[str, Any]) -> dict[str, str]:
    """Kinds of cost that are the same in all arms that have run, with their value: no column is needed for them."""
    found: dict[str, str] = {}
    for kind in COLUMNS:
        shown = {cost_cells(row)[kind] for row in result["arms"] if row["n"] or row["without_number"]}
        if len(shown) == 1 and next(iter(shown))[0] != "-":
            found[kind] = next(iter(shown))[0]
    return found


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """What the table says of an arm, beside its cost."""
    difference = row["difference"]
    found = ""
    if difference and difference["mean"] is not None:
        found = f"{difference['mean']:+.4f}"
        if difference["low"] is not None:
            found += f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    score = number(row["mean"]) + (f" ± {number(row['sd'])}" if row["sd"] is not None else "")
    runs = row["n"] + row["without_number"]
    early = f"{row['stopped_early']} of {runs}" if row["stopped_early"] else ""
    return {"score": score, "difference": found, "verdict": row["verdict"], "early": early, "seeds": str(runs)}


def as_terminal(result: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    early = any(row["stopped_early"] for row in result["arms"])
    same = alike(result)
    kinds = [kind for kind in COLUMNS if kind not in same]
    columns = ["", result["monitor"], f"difference, {result['level']:.0%} interval", ""]
    columns += [COLUMNS[kind] for kind in kinds]
    rows = []
    for row in result["arms"]:
        text, cost = cells(row), cost_cells(row)
        line = [row["name"], text["score"], text["difference"], text["verdict"]]
        line += [" ".join(cost[kind]).strip() for kind in kinds]
        rows.append(line + ([text["early"]] if early else []))
    table = render_table(columns + (["stopped early"] if early else []), rows)
    return table + ("\n" + in_all(same) if same else "")


def in_all(same: Mapping[str, str]) -> str:
    """A line on what :func:`alike` found."""
    return "The same in all arms: " + ", ".join(f"{COLUMNS[kind]} {value}" for kind, value in same.items()) + "."


def arm_csv(result: Mapping[str, Any]) -> str:
    """One line for each arm."""
    file = io.StringIO()
    costs = [f"{kind}{end}" for kind in COLUMNS for end in ("", "_ratio")]
    names = ["arm", "seeds", "mean", "sd", "difference", "low", "high", "p", "p_holm", "verdict", "stopped_early"]
    writer = csv.DictWriter(file, [*names, *costs], lineterminator="\n")
    writer.writeheader()
    for row in result["arms"]:
        difference = row["difference"] or {}
        line = {
            "arm": row["name"],
            "seeds": row["n"],
            "mean": row["mean"],
            "sd": row["sd"],
            "difference": difference.get("mean"),
            **{key: difference.get(key) for key in ("low", "high", "p", "p_holm")},
            "verdict": row["verdict"],
            "stopped_early": row["stopped_early"],
        }
        for kind in COLUMNS:
            line |= {kind: row["cost"][kind]["mean"], f"{kind}_ratio": row["cost"][kind]["ratio"]}
        writer.writerow(line)
    return file.getvalue()


def fit_csv(result: Mapping[str, Any]) -> str:
    """One line for each fit: arm, seed, score."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["arm", "seed", result["monitor"], "minus_reference"])
    for row in result["arms"]:
        pairs = (row["difference"] or {}).get("pairs", {})
        for seed, score in row["scores"].items():
            writer.writerow([row["name"], seed, score, pairs.get(seed)])
    return file.getvalue()
