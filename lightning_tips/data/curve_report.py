"""What `lightning-tips curve` shows: tables and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_tips.core import render_table
from lightning_tips.data.learning_curve import LearningCurve, fit_learning_curve
from lightning_tips.data.sweep import Point

__all__ = ["ClassGain", "class_gains", "class_table", "curve_table", "plot_curve", "predictions"]

TIMES = (2, 5, 10)


def predictions(curve: LearningCurve, total: int) -> list[dict[str, Any]]:
    """The expected score at 2, 5 and 10 times ``total`` samples, with a 90 % band; nothing if the curve abstains."""
    if curve.abstains:
        return []
    rows = []
    for times in TIMES:
        low, high = curve.interval(times * total)
        rows.append({"times": times, "n": times * total, "score": curve.predict(times * total), "band": [low, high]})
    return rows


def curve_table(curve: LearningCurve, points: Sequence[Point], total: int, monitor: str) -> str:
    """What was measured, and what is expected."""
    rows = []
    for n in sorted({point.n for point in points}):
        here = [point for point in points if point.n == n]
        scores = [point.score for point in here]
        spread = f"{min(scores):.4f} to {max(scores):.4f}" if len(scores) > 1 else ""
        times = "all the data" if n == total else f"{100 * n / total:.3g} % of it"
        rows.append([f"{n:,}", times, f"{statistics.fmean(scores):.4f}", spread, f"{len(scores)} fits"])
    for row in predictions(curve, total):
        low, high = row["band"]
        rows.append(
            [f"{row['n']:,}", f"{row['times']} times", f"{row['score']:.4f}", f"{low:.4f} to {high:.4f}", "expected"]
        )
    return render_table(["samples", "", monitor, "range, or 90 % band", ""], rows)


def plot_curve(
    curve: LearningCurve, points: Sequence[Point], path: Path, monitor: str, total: int, target: float | None = None
) -> None:
    """Draws the scores, the curve and its band to ten times the data, and the target, as a PNG."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_xscale("log")
    axis.plot([p.n for p in points], [p.score for p in points], "o", color="black", markersize=4, label="fits")
    if curve.abstains:
        axis.set_title(_wrapped(f"no curve: {curve.reason}"), fontsize="small", loc="left")
    else:
        n = np.geomspace(curve.sizes[0], TIMES[-1] * total, 80)
        low, high = curve.interval(n)
        axis.fill_between(n, low, high, alpha=0.25, linewidth=0, label="90 % band of the expected score")
        axis.plot(n, curve.predict(n), label="expected score")
        off, (least, most) = curve.levels_off_at()
        axis.set_title(f"levels off at {off:.4g} ({least:.4g} to {most:.4g})", fontsize="small", loc="left")
        for times in TIMES:
            axis.plot(times * total, curve.predict(times * total), "D", color="tab:blue", markersize=5)
            axis.annotate(
                f"{times} times:\n{curve.predict(times * total):.4g}",
                (times * total, curve.predict(times * total)),
                xytext=(0, -14 if curve.mode == "max" else 14),
                textcoords="offset points",
                ha="center",
                va="top" if curve.mode == "max" else "bottom",
                fontsize="small",
            )
    axis.axvline(total, color="grey", linestyle=":", label="all the data there is")
    if target is not None:
        axis.axhline(target, color="tab:red", linestyle="--", label=f"target {target:g}")
    axis.set_xlabel("training samples")
    axis.set_ylabel(monitor)
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="lower right" if curve.mode == "max" else "upper right", fontsize="small")
    figure.savefig(path, dpi=120)


def _wrapped(text: str, width: int = 100) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(lines)


@dataclass(frozen=True)
class ClassGain:
    """What more data is expected to do for a class.

    Attributes:
        name: Of the class.
        recall: Mean at the largest size.
        gain: Expected rise of the recall when the data doubles; None if its curve abstains.
        interval: 90 % interval of that.
        reason: Why it abstains.
    """

    name: str
    recall: float
    gain: float | None = None
    interval: tuple[float, float] | None = None
    reason: str | None = None


def class_gains(points: Sequence[Point]) -> list[ClassGain]:
    """A curve for the recall of each class, sorted by what doubling the data is expected to bring.

    Args:
        points: All fits; those without recalls are passed over.
    """
    known = [point for point in points if point.recalls]
    if not known:
        return []
    largest = max(point.n for point in known)
    classes = max(len(point.recalls) for point in known)
    names = next((point.names for point in known if point.names), ())
    gains = []
    for number in range(classes):
        name = names[number] if number < len(names) else str(number)
        pairs = [(p.n, r) for p in known if number < len(p.recalls) and (r := p.recalls[number]) is not None]
        if not pairs:
            continue  # no validation samples
        at_most = [recall for n, recall in pairs if n == largest]
        recall = statistics.fmean(at_most) if at_most else float("nan")
        if len({n for n, _ in pairs}) < 2:
            continue
        curve = fit_learning_curve([n for n, _ in pairs], [r for _, r in pairs], "max", (0.0, 1.0))
        if curve.abstains:
            gains.append(ClassGain(name, recall, reason=curve.reason))
        else:
            gain, (low, high) = curve.gain(largest, 2 * largest)
            left = 1 - recall  # the curve may run below what was measured, but no recall exceeds 1
            gains.append(ClassGain(name, recall, min(gain, left), (min(low, left), min(high, left))))
    return sorted(gains, key=lambda one: (one.gain is None, -(one.gain or 0.0), one.recall))


def class_table(gains: Sequence[ClassGain]) -> str:
    """Which class to collect, the best first."""
    rows = []
    for one in gains:
        if one.gain is None or one.interval is None:
            short = str(one.reason).split(":")[0].split(" (")[0]
            rows.append([one.name, f"{one.recall:.3f}", "", "", short if len(short) < 70 else short[:67] + "..."])
        else:
            band = f"{one.interval[0]:+.3f} to {one.interval[1]:+.3f}"
            rows.append([one.name, f"{one.recall:.3f}", f"{one.gain:+.3f}", band, ""])
    return render_table(["class", "recall now", "doubled", "90 %", "no curve because"], rows)
