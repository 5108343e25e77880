"""The page of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

from lightning_tips.compare.plots import axis_reach, color_of, plot_cost, plot_curves, svg_of, tint_of
from lightning_tips.compare.results import summarize
from lightning_tips.compare.table import COLUMNS, alike, cells, cost_cells, in_all, number

__all__ = ["as_page"]

WIDTH, HEIGHT = 170, 20  # of the small plot in each row, pixels

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: #20262e; font: 13.5px/1.45 system-ui, "Segoe UI", Roboto, Arial,
  sans-serif; }
main { max-width: 1480px; margin: 0 auto; padding: 16px 24px 32px; }
h1 { font-size: 20px; font-weight: 600; margin: 0; }
h2 { font-size: 14px; font-weight: 600; margin: 0 0 6px; }
.under { color: #5f6b7a; margin: 2px 0 12px; }
.answer { font-size: 15px; margin: 0 0 12px; padding: 0; list-style: none; }
.card .under { margin: 4px 7px 0; font-size: 13px; }
.card { background: #fff; border: 1px solid #e3e7ec; border-radius: 8px; padding: 9px 14px; margin-bottom: 12px; }
.scroll { overflow-x: auto; }
table { font-size: 13px; border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: #5f6b7a; text-align: right; white-space: nowrap; padding: 2px 6px;
  border-bottom: 1px solid #e3e7ec; vertical-align: bottom; }
td { text-align: right; padding: 3px 6px; border-bottom: 1px solid #f0f2f5; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child, .left { text-align: left; }
td small { color: #7b8794; margin-left: 4px; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px; }
.name { font-weight: 500; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
.two .card { margin-bottom: 0; }
img { width: 100%; height: auto; display: block; }
details { background: #fff; border: 1px solid #e3e7ec; border-radius: 8px; padding: 8px 16px; margin-top: 10px; }
summary { cursor: pointer; font-weight: 500; }
pre { background: #f6f7f9; border-radius: 6px; padding: 10px; overflow-x: auto; font-size: 12px; line-height: 1.4; }
ul { margin: 4px 0; padding-left: 18px; }
.notes li { margin: 2px 0; }
@media (max-width: 900px) { .two { grid-template-columns: 1fr; } }
"""


def as_page(result: Mapping[str, Any], yamls: Mapping[str, str], about: Mapping[str, str]) -> str:
    """The page.

    Args:
        result: From :func:`collect`.
        yamls: By arm, its configuration.
        about: What stands under the machine: name to value.
    """
    better = "higher" if result["mode"] == "max" else "lower"
    which = "the last epoch" if result["score"] == "last" else "the best epoch"
    others = len(result["arms"]) - 1
    under = (
        f"{result['monitor']} of {which}, {better} is better. {others} arm{'s' * (others != 1)} beside"
        f" {result['reference']}, seeds {', '.join(map(str, result['seeds']))}, paired."
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Does a tip help here?</title><style>{_STYLE}</style></head><body><main>",
        f'<h1>Does a tip help here?</h1><p class="under">{escape(under)}</p>',
        f'<ul class="answer">{"".join(_sentence(line) for line in summarize(result))}</ul>',
        f'<div class="card scroll">{_table(result)}</div>',
        f'<div class="two"><div class="card"><h2>{escape(result["monitor"])} over epochs, mean over seeds</h2>'
        f"{_image(svg_of(plot_curves(result)), 'Score over epochs')}</div>",
        f'<div class="card"><h2>What it costs</h2>{_image(svg_of(plot_cost(result)), "Score against time")}</div>',
        "</div>",
    ]
    if result["notes"]:
        items = "".join(f"<li>{escape(note)}</li>" for note in result["notes"])
        parts.append(f'<details open><summary>Before you believe it</summary><ul class="notes">{items}</ul></details>')
    parts.append(f"<details><summary>How to read it</summary>{_reading(result)}</details>")
    parts.append(f"<details><summary>Scores of each fit</summary>{_scores(result)}</details>")
    for row in result["arms"]:
        if row["name"] in yamls:
            title = f"{row['name']}: {row['change']}" if row["change"] else row["name"]
            parts.append(
                f"<details><summary>{escape(title)}</summary><pre>{escape(yamls[row['name']])}</pre></details>"
            )
    machine = "".join(f"<li>{escape(name)}: {escape(value)}</li>" for name, value in about.items())
    parts += [f"<details><summary>Machine and versions</summary><ul>{machine}</ul></details>", "</main></body></html>"]
    return "\n".join(parts) + "\n"


def _sentence(line: str) -> str:
    head, _, rest = line.partition(":")
    color = color_of(head.lower())
    return f'<li><b style="color:{color}">{escape(head)}</b>:{escape(rest)}</li>'


def _image(svg: str, alt: str) -> str:
    # As an image, so that the names within one picture do not meet those of the other.
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">'


def _table(result: Mapping[str, Any]) -> str:
    reach = axis_reach(result)
    early = any(row["stopped_early"] for row in result["arms"])
    same = alike(result)
    kinds = [kind for kind in COLUMNS if kind not in same]
    scale = f"{_axis(reach)}difference, {result['level']:.0%} interval"
    heads = [
        "arm",
        escape(result["monitor"]),
        f'<span class="left">{scale}</span>',
        "",
        "",
        *(COLUMNS[kind] for kind in kinds),
    ]
    heads += ["stopped early"] if early else []
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for index, row in enumerate(result["arms"]):
        text = cells(row)
        mark = f'<span class="dot" style="background:{tint_of(index)}"></span>'
        line = [
            f'<td title="{escape(row["change"])}">{mark}<span class="name">{escape(row["name"])}</span></td>',
            f"<td>{escape(text['score'])}</td>",
            f"<td>{_forest(row, reach)}</td>",
            f"<td>{escape(text['difference'])}</td>",
            f'<td class="left" style="color:{color_of(row["verdict"])}">{escape(row["verdict"])}</td>',
        ]
        cost = cost_cells(row)
        line += ["<td>{}<small>{}</small></td>".format(*cost[kind]) for kind in kinds]
        lines.append("<tr>" + "".join(line) + (f"<td>{text['early']}</td>" if early else "") + "</tr>")
    note = f'<p class="under">{in_all(same)}</p>' if same else ""
    return f"<table>{''.join(lines)}</table>{note}"


def _axis(reach: float) -> str:
    ticks = [(-reach / 1.1, "start"), (0.0, "middle"), (reach / 1.1, "end")]
    text = "".join(
        f'<text x="{_x(value, reach):.1f}" y="10" text-anchor="{anchor}">{value:+.2g}</text>'
        if value
        else f'<text x="{_x(0, reach):.1f}" y="10" text-anchor="middle">0</text>'
        for value, anchor in ticks
    )
    return (
        f'<svg width="{WIDTH}" height="12" style="display:block;margin-left:auto" font-size="10" fill="#7b8794">'
        f"{text}</svg>"
    )


def _x(value: float, reach: float) -> float:
    return WIDTH * (0.5 + 0.5 * max(-1.0, min(1.0, value / reach)))


def _forest(row: Mapping[str, Any], reach: float) -> str:
    """Interval, mean and seeds of a row; an interval that leaves the picture ends in an arrow."""
    middle, color = HEIGHT / 2, color_of(row["verdict"])
    parts = [f'<line x1="{WIDTH / 2}" x2="{WIDTH / 2}" y1="0" y2="{HEIGHT}" stroke="#c3cad3"/>']
    difference = row["difference"]
    if difference and difference["mean"] is not None:
        if difference["low"] is not None:
            low, high = _x(difference["low"], reach), _x(difference["high"], reach)
            parts.append(
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="{color}" stroke-width="2"/>'
            )
            for end, x, side in ((difference["low"], low, 1), (difference["high"], high, -1)):
                if abs(end) > reach:
                    tip = f"{x:.1f},{middle} {x + 6 * side:.1f},{middle - 4} {x + 6 * side:.1f},{middle + 4}"
                    parts.append(f'<polygon points="{tip}" fill="{color}"/>')
        for value in difference["pairs"].values():
            x = _x(value, reach)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="5" y2="{HEIGHT - 5}" stroke="{color}" opacity=".55"/>')
        x = _x(difference["mean"], reach)
        parts.append(f'<circle cx="{x:.1f}" cy="{middle}" r="4" fill="{color}"/>')
    return f'<svg width="{WIDTH}" height="{HEIGHT}" style="display:block;margin-left:auto">{"".join(parts)}</svg>'


def _scores(result: Mapping[str, Any]) -> str:
    seeds = [str(seed) for seed in result["seeds"]]
    lines = ["<tr><th>arm</th>" + "".join(f"<th>seed {seed}</th>" for seed in seeds) + "<th>epochs</th></tr>"]
    for row in result["arms"]:
        found = [
            number(row["scores"][s]) if s in row["scores"] else "failed" if s in row["failed"] else "" for s in seeds
        ]
        epochs = ", ".join(map(str, row["epochs"])) if len(set(row["epochs"])) > 1 else str((row["epochs"] or [""])[0])
        lines.append(
            f"<tr><td>{escape(row['name'])}</td>{''.join(f'<td>{value}</td>' for value in found)}<td>{epochs}</td></tr>"
        )
    return f"<table>{''.join(lines)}</table>"


def _reading(result: Mapping[str, Any]) -> str:
    level = f"{result['level']:.0%}"
    points = [
        f"Each arm is trained with the same seeds. The difference is that of the arm and {result['reference']} with the"
        " same seed, so what a seed does to both falls out. In the small plots a stroke is a seed, the point their"
        f" mean, the bar the {level} t interval of the mean; an arrow says that it goes on.",
        "“No measurable effect”: the interval holds 0. It may still be there, but smaller than these seeds can show;"
        " the ends of the interval say how large it can be. More seeds (finished fits are kept) make it narrower.",
        "“Better” and “worse” also passed Holm's correction for the number of arms: the more arms one tries, the more"
        " often one of them wins by luck. “But uncertain”: the interval leaves out 0, but the correction does not.",
        'Costs: "x1.05" is 1.05 times that of the reference. Training is wall time with validation, without the start'
        " of the process; a step is the median, with its data; arms that trained at once on one device slow each other"
        " down. MACs and latency are of one forward pass of a trained network, latencies measured in turns and in"
        " random order. Peak memory is of training: on a GPU what was allocated there, on the CPU that of the whole"
        " process.",
    ]
    if result["score"] == "best":
        points.append("The score is that of the best epoch, chosen by looking at it: too good by a little in all arms.")
    return "<ul>" + "".join(f"<li>{escape(point)}</li>" for point in points) + "</ul>"
