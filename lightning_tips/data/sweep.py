"""A sweep over sizes: which to train, what its fits came to, and whether compute held them back."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_tips.core import Fit, did_you_mean
from lightning_tips.data.behaviour import FEWEST, SPAN
from lightning_tips.data.subset import nested_subset, subset_size

__all__ = ["DivergedFitError", "Point", "choose_sizes", "expected_seconds", "find_limits", "read_point"]

RUNGS = 6


class DivergedFitError(ValueError):
    """A fit that ended with a metric that is no number; the message says so."""


@dataclass(frozen=True)
class Point:
    """One fit of a sweep.

    Attributes:
        n: Training samples.
        seed: Its seed.
        score: The monitored metric: at its end, or its best.
        history: The metric of each validation.
        epochs, steps, seconds: That it took.
        stopped_early: Whether something stopped it before ``max_epochs`` or ``max_steps``.
        recalls: (C,) of the same validation as the score; None without samples. Empty where they are not known.
        names: Of the classes, where they are known.
        problem: Why there are no recalls.
        validation: Hash of the validation targets; empty where it is not known.
    """

    n: int
    seed: int
    score: float
    history: tuple[float, ...]
    epochs: int
    steps: int
    seconds: float
    stopped_early: bool
    recalls: tuple[float | None, ...] = ()
    names: tuple[str, ...] = ()
    problem: str | None = None
    validation: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return {key: value for key, value in asdict(self).items() if key not in ("history", "names")}


def choose_sizes(labels_or_n: Any, wanted: Sequence[int | float] = ()) -> list[int]:
    """The sizes of a sweep, each of which can be chosen.

    Args:
        labels_or_n: As in :func:`nested_subset`.
        wanted: Sizes, or shares of the whole; by default all of the data, a half, a quarter, and so on: six of them,
            as far as each holds at least two samples of a class on average, and 20 in all.

    Returns:
        In ascending order.

    Raises:
        ValueError: If they are too few or too close together for a curve, or one is smaller than the number of classes.
    """
    total = int(labels_or_n) if isinstance(labels_or_n, int) else len(labels_or_n)
    if wanted:
        sizes = sorted({subset_size(size, total) for size in wanted})
        if len(sizes) < FEWEST:
            raise ValueError(
                f"{len(sizes)} size{'s' * (len(sizes) > 1)} ({', '.join(map(str, sizes))}): a curve needs {FEWEST} or"
                f" more, such as --sizes {' '.join(str(max(total >> k, 1)) for k in (4, 3, 2, 1, 0))}."
            )
    else:
        groups = 1 if isinstance(labels_or_n, int) else len(np.unique(np.asarray(labels_or_n), axis=0))
        sizes = sorted({total >> k for k in range(RUNGS) if total >> k >= max(20, 2 * groups)})
        if len(sizes) < FEWEST:
            raise ValueError(
                f"{total} training samples of {groups} classes are too few for a curve of {FEWEST} sizes; give --sizes."
            )
    if sizes[-1] < SPAN * sizes[0]:
        raise ValueError(f"--sizes {sizes}: the largest must be {SPAN:g} times the smallest or more.")
    nested_subset(labels_or_n, sizes[0])  # what is smaller than the number of classes ends here
    return sizes


def read_point(fit: Fit, n: int, seed: int, monitor: str, mode: str, take: str) -> Point:
    """What a finished fit came to.

    Args:
        fit: It.
        n: Its size.
        seed: Its seed.
        monitor: The metric.
        mode: ``"max"`` or ``"min"``.
        take: ``"last"``, ``"best"``, or ``"auto"``: the best one where the fit was stopped early, else the last.

    Raises:
        ValueError: If the fit logged no such metric.
        DivergedFitError: If the metric is no number in the end.
    """
    record = fit.record
    rows = [row for row in record["rows"] if row.get(monitor) is not None]
    if not rows:
        known = {key for row in record["rows"] for key in row} - {"epoch", "step"}
        raise ValueError(
            f"{fit.name} logged no finite {monitor!r}. {did_you_mean(monitor, known)} What is trained is kept: give the"
            " right --monitor and run the same command again."
        )
    if record["rows"][-1].get(monitor, 0.0) is None:
        raise DivergedFitError(f"{monitor} is no number at its end")
    best = take == "best" or (take == "auto" and record["stopped_early"])
    row = (max if mode == "max" else min)(rows, key=lambda r: r[monitor]) if best else rows[-1]
    path = fit.folder / "recalls.json"
    classes: dict[str, Any] = {"rows": [], "problem": "there is no recalls.json"}
    if path.exists():
        classes = json.loads(path.read_text())
    found: list[float | None] = next((one["recalls"] for one in classes["rows"] if one["step"] == row["step"]), [])
    return Point(
        n=n,
        seed=seed,
        score=float(row[monitor]),
        history=tuple(float(r[monitor]) for r in rows),
        epochs=int(record["epochs"]),
        steps=int(record["steps"]),
        seconds=float(record["seconds"]),
        stopped_early=bool(record["stopped_early"]),
        recalls=tuple(found),
        names=tuple(classes.get("names", ())),
        problem=classes["problem"],
        validation=classes.get("validation", ""),
    )


def find_limits(points: Sequence[Point], mode: str) -> list[str]:
    """What makes a curve one of compute rather than of data: sentences for the user.

    Args:
        points: All fits.
        mode: ``"max"`` or ``"min"``.
    """
    told = []
    sizes = sorted({point.n for point in points})
    by_size = {n: [point for point in points if point.n == n] for n in sizes}
    sign = 1 if mode == "max" else -1
    means = [statistics.fmean(point.score for point in by_size[n]) for n in sizes]
    whole = abs(means[-1] - means[0])
    rising = [n for n in sizes if _is_rising(by_size[n], sign, whole)]
    if rising:
        told.append(
            f"At {', '.join(f'{n:,}' for n in rising)} samples the score was still getting better when training ended:"
            " the curve is limited by compute there, not by data, and what it says of more data is wrong. Train for"
            " longer (--trainer.max_epochs), or with EarlyStopping and a max_epochs that is out of reach."
        )
    steps = [statistics.median(point.steps for point in by_size[n]) for n in sizes]
    stopped = [point for point in points if point.stopped_early]
    if len(sizes) > 1 and steps[-1] < 1.5 * steps[0] and not stopped:
        told.append(
            f"All sizes were trained for about the same number of steps ({int(steps[0]):,} to {int(steps[-1]):,}; is"
            " max_steps set, or limit_train_batches?). Large sizes then see each sample less often, and the curve"
            " flattens for want of compute. Let the yaml say max_epochs."
        )
    if stopped and len(stopped) < len(points):
        late = sorted({point.n for point in points if not point.stopped_early})
        told.append(
            f"Early stopping did not come in at {', '.join(f'{n:,}' for n in late)} samples, where max_epochs came"
            " first: raise it."
        )
    if len({point.validation for point in points if point.validation}) > 1:
        told.append(
            "The validation data was not the same in all fits: it is split off by the seed of the run, so the seeds'"
            " scores differ for that too. Give the split a seed of its own (random_split with a generator)."
        )
    return told


def _is_rising(points: Sequence[Point], sign: int, whole: float) -> bool:
    """Whether the last fifth of the training brought more than a fiftieth of the whole curve, in all fits of a size."""
    gains = []
    for point in points:
        if point.stopped_early or len(point.history) < 5:
            continue
        last = max(1, len(point.history) // 5)
        late, before = point.history[-last:], point.history[-2 * last : -last]
        gains.append(sign * (statistics.fmean(late) - statistics.fmean(before)))
    if not gains or min(gains) <= 0:
        return False
    spread = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return statistics.fmean(gains) > max(0.02 * whole, 2 * spread)


def expected_seconds(done: Sequence[tuple[int, float]], waiting: Sequence[int], workers: int) -> float | None:
    """Wall time that the rest of a sweep takes: a start, and a part that grows with the size.

    Args:
        done: Size and seconds of each fit that has finished.
        waiting: Sizes of those that have not.
        workers: Fits at once.

    Returns:
        Seconds; None before any fit has finished.
    """
    if not done:
        return None
    n, seconds = np.array([one[0] for one in done], float), np.array([one[1] for one in done], float)
    start, slope = float(seconds.min()), 0.0
    if len(set(n)) > 1:
        slope, start = (float(value) for value in np.polyfit(n, seconds, 1))
        if slope < 0 or start < 0:
            slope = max(float((n * seconds).sum() / (n * n).sum()), 0.0) if start < 0 else 0.0
            start = 0.0 if start < 0 else float(seconds.mean())
    return sum(start + slope * size for size in waiting) / max(workers, 1)


def scores_of(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    """Sizes and scores, for `fit_learning_curve`."""
    return [point.n for point in points], [point.score for point in points]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file as a whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
