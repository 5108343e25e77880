"""From the records of fits to the result of a comparison, as plain data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_tips.compare.arms import Arm
from lightning_tips.compare.statistics import Mode, holm, paired_difference, spread, verdict
from lightning_tips.core import did_you_mean
from lightning_tips.core.history import json_numbers

__all__ = ["COSTS", "Score", "collect", "hopeless", "score_of", "summarize"]

Score = Literal["last", "best"]
Records = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""By arm and seed, what FitRecord wrote."""

COSTS = ("seconds", "step_seconds", "parameters", "peak_megabytes")
"""What each record says of the cost."""


def score_of(record: Mapping[str, Any], monitor: str, score: Score, mode: Mode) -> float:
    """The score of one fit; NaN if it is no number, as of a fit that diverged.

    Args:
        record: What FitRecord wrote.
        monitor: The metric.
        score: ``"last"``: of the last epoch; ``"best"``: of the best one.
        mode: What is better.

    Raises:
        ValueError: If the metric was not logged; the message names those that were.
    """
    rows = [row[monitor] for row in record["rows"] if monitor in row]
    if not rows:
        logged = sorted({name for row in record["rows"] for name in row} - {"epoch", "step"})
        raise ValueError(f"No fit logs {monitor!r} by epoch. {did_you_mean(monitor, logged)}")
    numbers = [math.nan if value is None else float(value) for value in rows]
    if score == "last":
        return numbers[-1]
    finite = [value for value in numbers if math.isfinite(value)]
    return (min if mode == "min" else max)(finite, default=math.nan)


def _scores(records: Mapping[int, Mapping[str, Any]], monitor: str, score: Score, mode: Mode) -> dict[int, float]:
    return {seed: score_of(record, monitor, score, mode) for seed, record in sorted(records.items())}


def _paired(mine: Mapping[int, float], reference: Mapping[int, float]) -> list[int]:
    """The seeds for which both ended with a number."""
    return [s for s in mine if s in reference and math.isfinite(mine[s]) and math.isfinite(reference[s])]


def hopeless(
    mine: Mapping[int, float], reference: Mapping[int, float], mode: Mode, level: float, looks: int
) -> str | None:
    """Whether an arm need not be looked at any further, and why: it is measurably worse already.

    The rule: of the pairs so far, at least two, the t interval of the difference lies on the worse side of 0. Looking
    again after each seed would find that by chance more often than its level says, so the level is divided by the
    number of looks (Bonferroni). An arm without a measurable effect goes on: it may still show one.

    Args:
        mine: Score by seed.
        reference: Of the reference, by seed.
        mode: What is better.
        level: Of the interval at the end, such as 0.95.
        looks: How often one may look at most.
    """
    seeds = _paired(mine, reference)
    if len(seeds) < 2:
        return None
    strict = 1 - (1 - level) / max(looks, 1)
    found = paired_difference([mine[s] for s in seeds], [reference[s] for s in seeds], strict)
    if not (found.high < 0 if mode == "max" else found.low > 0):
        return None
    return (
        f"measurably worse after {len(seeds)} seeds: {found.mean:+.4g}, {strict:.1%} interval"
        f" [{found.low:+.4g}, {found.high:+.4g}]"
    )


def collect(
    arms: Sequence[Arm],
    records: Records,
    failed: Mapping[str, Mapping[int, str]],
    left_out: Mapping[str, str],
    *,
    monitor: str,
    mode: Mode,
    score: Score = "last",
    seeds: Sequence[int] = (),
    level: float = 0.95,
    measured: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The result of a comparison.

    Args:
        arms: The first is the reference.
        records: What each fit that has finished left.
        failed: By arm and seed, the last words of the others.
        left_out: By arm, why it was given fewer seeds.
        monitor: The metric.
        mode: What is better.
        score: Of which epoch.
        seeds: All that were asked for.
        level: Of the intervals.
        measured: By arm, what else is known of its cost: ``macs``, ``latency_seconds``, or ``why_not``.

    Returns:
        Plain data; numbers that there are not are None.

    Raises:
        ValueError: If the metric was not logged.
    """
    measured = measured or {}
    scores = {arm.name: _scores(records.get(arm.name, {}), monitor, score, mode) for arm in arms}
    reference = arms[0].name
    differences = {}
    for arm in arms[1:]:
        pairs = _paired(scores[arm.name], scores[reference])
        mine, theirs = ([scores[name][s] for s in pairs] for name in (arm.name, reference))
        differences[arm.name] = (pairs, paired_difference(mine, theirs, level))
    corrected = dict(zip(differences, holm([d.p for _, d in differences.values()]), strict=True))
    rows = []
    for arm in arms:
        done = records.get(arm.name, {})
        finite = [value for value in scores[arm.name].values() if math.isfinite(value)]
        mean, sd = spread(finite)
        row: dict[str, Any] = {
            "name": arm.name,
            "change": arm.change,
            "tips": list(arm.tips),
            "scores": {str(seed): value for seed, value in scores[arm.name].items()},
            "n": len(finite),
            "mean": mean,
            "sd": sd,
            "without_number": len(done) - len(finite),
            "cost": _cost(done, records.get(reference, {}), measured.get(arm.name, {}), measured.get(reference, {})),
            "stopped_early": sum(bool(record["stopped_early"]) for record in done.values()),
            "epochs": [record["epochs"] for _, record in sorted(done.items())],
            "failed": {str(seed): words for seed, words in failed.get(arm.name, {}).items()},
            "left_out": left_out.get(arm.name),
            "curve": _curve(list(done.values()), monitor),
        }
        if arm.name == reference:
            row |= {"difference": None, "verdict": "reference"}
        else:
            pairs, found = differences[arm.name]
            row["difference"] = found.to_dict() | {
                "p_holm": corrected[arm.name],
                "pairs": {str(s): scores[arm.name][s] - scores[reference][s] for s in pairs},
            }
            row["verdict"] = verdict(found, corrected[arm.name], mode)
        if not done:
            row["verdict"] = "failed" if failed.get(arm.name) else "not run"
        rows.append(row)
    result = {
        "monitor": monitor,
        "mode": mode,
        "score": score,
        "level": level,
        "seeds": list(seeds),
        "reference": reference,
        "arms": rows,
    }
    result["notes"] = _notes(result)
    return dict(json_numbers(result))


def _cost(
    done: Mapping[int, Mapping[str, Any]],
    reference: Mapping[int, Mapping[str, Any]],
    measured: Mapping[str, Any],
    measured_reference: Mapping[str, Any],
) -> dict[str, Any]:
    """By kind: mean, and ratio to the reference (the median of the pairs' ratios)."""
    cost: dict[str, Any] = {}
    for kind in COSTS:
        known = {s: float(r[kind]) for s, r in done.items() if r.get(kind) is not None}
        base = {s: float(r[kind]) for s, r in reference.items() if r.get(kind)}
        ratios = [known[s] / base[s] for s in known if s in base]
        mean, sd = spread(list(known.values()))
        cost[kind] = {"mean": mean, "sd": sd, "ratio": statistics.median(ratios) if ratios else math.nan}
    for kind in ("macs", "latency_seconds"):
        mine, base_value = measured.get(kind), measured_reference.get(kind)
        cost[kind] = {
            "mean": math.nan if mine is None else float(mine),
            "ratio": float(mine) / float(base_value) if mine and base_value else math.nan,
        }
    cost["why_not"] = measured.get("why_not")
    return cost


def _curve(records: Sequence[Mapping[str, Any]], monitor: str) -> list[list[float]]:
    """Epoch (counted from 1) and mean of the metric over the fits that got there."""
    by_epoch: dict[float, list[float]] = {}
    for record in records:
        last = {row["epoch"]: row[monitor] for row in record["rows"] if row.get(monitor) is not None}
        for epoch, value in last.items():
            by_epoch.setdefault(epoch, []).append(value)
    return [[epoch + 1, statistics.fmean(values)] for epoch, values in sorted(by_epoch.items())]


def _notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader has to know before believing a number."""
    notes = []
    others = [row for row in result["arms"] if row["difference"] is not None]
    most = max((row["difference"]["n"] for row in others), default=0)
    if most == 1:
        notes.append("One seed only: nothing can be said of chance. Give --seeds 3 or more.")
    elif most == 2:
        notes.append(
            "Two seeds are very little: the interval is 12.7 standard errors to each side, so that only huge effects"
            " show. Give --seeds 3 or more; finished fits are kept."
        )
    if len(others) > 1 and most > 1:
        notes.append(
            f"{len(others)} arms are compared with {result['reference']}: each interval holds for itself alone. Whether"
            f" an arm is called better or worse goes by Holm's correction for their number, at {result['level']:.0%}."
        )
    if result["score"] == "best":
        notes.append("Scores are those of each fit's best epoch, which chance makes look better than they are.")
    for row in result["arms"]:
        if row["without_number"]:
            notes.append(
                f"{row['name']}: {row['without_number']} of {row['n'] + row['without_number']} fits ended with no"
                " number and stand in no mean."
            )
        if row["failed"]:
            seeds = ", ".join(row["failed"])
            notes.append(f"{row['name']} failed (seed {seeds}): {next(iter(row['failed'].values()))}")
        if row["left_out"]:
            notes.append(f"{row['name']} got fewer seeds: {row['left_out']}")
        if row["cost"]["why_not"]:
            notes.append(f"{row['name']}: MACs and latency were not measured: {row['cost']['why_not']}")
        difference = row["difference"]
        if difference and difference["n"] > 1 and difference["sd"] == 0 and difference["mean"] != 0:
            notes.append(
                f"{row['name']} differs by the same in each seed: the score is too coarse for chance to be seen."
            )
    return notes


def summarize(result: Mapping[str, Any]) -> list[str]:
    """The answer, a sentence for each kind of verdict.

    Args:
        result: From :func:`collect`.
    """
    by_verdict: dict[str, list[str]] = {}
    for row in result["arms"]:
        if row["verdict"] == "reference":
            continue
        words, d = row["name"], row["difference"]
        if d and d["n"] > 1 and row["verdict"] != "no measurable effect":
            words += f" ({d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}])"
        by_verdict.setdefault(row["verdict"], []).append(words)
    first = ("better", "worse", "no measurable")
    order = sorted(by_verdict, key=lambda v: ([not v.startswith(words) for words in first], v))
    return [f"{found[0].upper()}{found[1:]}: {', '.join(by_verdict[found])}." for found in order]
