"""When do the triggers of the optimizer switch fire? False alarms and catches on synthetic validation curves.

A curve is a falling (or, for mode "max", rising) progress plus independent noise of standard deviation sigma. What
decides is the improvement per validation divided by sigma. A curve counts as improving only as long as this ratio is
at least `SLOWEST`; the table over the ratio says what happens below. No torch, no Lightning.

    python benchmarks/optimizer/triggers.py [--curves 200] [--seeds 3] [--out benchmarks/optimizer/triggers.json]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from lightning_tips.optimizer.triggers import FluctuationTrigger, PlateauTrigger

SLOWEST = 3.0
FIRST_SEED = 100  # the thresholds were chosen on seeds under 100
PATIENCE = 3  # the default of both triggers
RATIOS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
PATIENCES = (3, 5, 8)
AFTER = 30  # validations of a curve that belong to what is to be caught

FAMILIES = {
    "common": "half of the curves a loss 0.3 + 2 p (mode min), half an accuracy 0.9 - 0.7 p (mode max); progress p "
    "falls as (1+t)^-a, a in U(0.3, 1), or exp(-t/tau), tau in U(4, 12) validations, or linearly; sigma is "
    "log-uniform in 0.1 to 1 % of the whole fall (linear: improvement 3 to 10 sigma); cut at 60 validations or where "
    f"the improvement per validation falls under {SLOWEST:g} sigma, redrawn if shorter than 8",
    "improving": "common",
    "improving, proportional noise": "common, sigma up to 3 times as large at the start (ratio down to 1)",
    "improving, heavy tails": "common, noise Student-t with 4 degrees of freedom scaled to sigma",
    "improving, one spike": "common, one validation after the second worse by 5 to 20 sigma",
    "improving, rate drop": "common, from a random validation on better by 10 to 40 % of the whole fall",
    "flat": "noise only, from the first validation",
    "flat after improving": "common, then the last level",
    "oscillating": "common, then a sine of period U(2, 4) and amplitude U(2, 6) sigma around the last level",
    "sawtooth": "common, then a rising or falling sawtooth of period 2, 3 or 4 and amplitude U(2, 6) sigma",
    "overfitting": "common, then worse by U(0.1, 1) sigma per validation",
}
IMPROVING = tuple(kind for kind in FAMILIES if kind.startswith("improving"))
STALLED = ("flat", "flat after improving", "oscillating", "sawtooth", "overfitting")


class Trigger(Protocol):
    """Takes one value per validation, says whether to switch."""

    def update(self, value: float, epoch: int) -> bool:
        """Take the metric of one validation."""
        ...


class BestSoFar:
    """The control: fires after `patience` validations without a new best, as early stopping does."""

    def __init__(self, mode: str, patience: int) -> None:
        self.sign, self.patience, self.best, self.wait = (1 if mode == "min" else -1), patience, np.inf, 0

    def update(self, value: float, epoch: int) -> bool:
        """Take the metric of one validation."""
        better = self.sign * value < self.best
        self.best, self.wait = (self.sign * value, 0) if better else (self.best, self.wait + 1)
        return self.wait >= self.patience


ARMS: dict[str, Callable[..., Trigger]] = {
    "PlateauTrigger": PlateauTrigger,
    "FluctuationTrigger": FluctuationTrigger,
    "PlateauTrigger, smoothing 0.5": lambda **arguments: PlateauTrigger(smoothing=0.5, **arguments),
    "control: best so far": BestSoFar,
}


class Curve(NamedTuple):
    """A validation curve, its mode, and what a trigger ought to see in it."""

    values: list[float]
    stalls_at: int | None  # first validation at the last level; None: it improves to the end
    mode: str


def progress(rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Noise-free progress from 1 towards 0 while it is at least SLOWEST sigma per validation, and sigma."""
    while True:
        time = np.arange(60.0)
        curve: np.ndarray
        shape = rng.choice(["power", "exponential", "linear"])
        sigma = float(np.exp(rng.uniform(np.log(0.001), np.log(0.01))))
        if shape == "power":
            curve = (1 + time) ** -rng.uniform(0.3, 1.0)
        elif shape == "exponential":
            curve = np.exp(-time / rng.uniform(4, 12))
        else:
            curve = 1 - time * sigma * np.exp(rng.uniform(np.log(3), np.log(10)))
            curve = curve[curve >= 0]
        fast = -np.diff(curve) >= SLOWEST * sigma
        length = len(curve) if fast.all() else int(fast.argmin()) + 1
        if length >= 8:
            return curve[:length], sigma


def draw(kind: str, rng: np.random.Generator) -> Curve:
    """One curve of a kind in FAMILIES."""
    curve, sigma = progress(rng)
    stalls_at = None
    if kind in STALLED:
        if kind == "flat":
            curve = curve[:1]
        stalls_at, time = len(curve) - 1, np.arange(AFTER)
        phase, amplitude = rng.uniform(), sigma * rng.uniform(2, 6)
        change: np.ndarray = np.zeros(AFTER)
        if kind == "oscillating":
            change = amplitude * np.sin(2 * np.pi * (time / rng.uniform(2, 4) + phase))
        elif kind == "sawtooth":
            change = rng.choice([-1, 1]) * amplitude * (2 * ((time / rng.integers(2, 5) + phase) % 1) - 1)
        elif kind == "overfitting":
            change = sigma * rng.uniform(0.1, 1) * time
        curve = np.concatenate([curve[:-1], curve[-1] + change])
    noise = rng.normal(size=len(curve))
    if kind == "improving, heavy tails":
        noise = rng.standard_t(4, size=len(curve)) / np.sqrt(2)
    elif kind == "improving, proportional noise":
        noise *= 1 + 2 * (curve - curve[-1]) / (curve[0] - curve[-1])
    elif kind == "improving, one spike":
        noise[rng.integers(2, len(curve))] += rng.uniform(5, 20)
    elif kind == "improving, rate drop":
        curve[rng.integers(2, len(curve)) :] -= rng.uniform(0.1, 0.4)
    values = curve + sigma * noise
    if rng.uniform() < 0.5:
        return Curve((0.3 + 2 * values).tolist(), stalls_at, "min")
    return Curve((0.9 - 0.7 * values).tolist(), stalls_at, "max")


def at_ratio(ratio: float, stalled: bool, rng: np.random.Generator) -> Curve:
    """A linear curve that improves by `ratio` sigma at every validation: 30 of them, or 8 to 25 and then flat."""
    length = int(rng.integers(8, 26)) if stalled else 30
    curve = -ratio * np.arange(length)
    if stalled:
        curve = np.concatenate([curve, np.full(AFTER, curve[-1])])
    return Curve((curve + rng.normal(size=len(curve))).tolist(), length - 1 if stalled else None, "min")


def fires_at(trigger: Trigger, curve: Curve) -> int | None:
    return next((epoch for epoch, value in enumerate(curve.values) if trigger.update(value, epoch)), None)


def delays(arm: str, patience: int, curves: list[Curve]) -> list[int | None]:
    """Validations from the stall to the firing: negative is a false alarm, None is never."""
    fired = [fires_at(ARMS[arm](mode=curve.mode, patience=patience), curve) for curve in curves]
    return [None if at is None else at - (curve.stalls_at or 0) for at, curve in zip(fired, curves, strict=True)]


def caught(delay: int | None, patience: int) -> bool:
    return delay is not None and 0 <= delay <= patience + 2


def share(flags: list[bool]) -> float:
    return round(sum(flags) / len(flags), 4)


def headline(arm: str, n: int, seeds: int) -> dict[str, Any]:
    """Every kind of curve with the default setting: rate at each seed, delays over all seeds."""
    result: dict[str, Any] = {"false_alarms": {}, "caught": {}}
    every: list[list[bool]] = [[] for _ in range(seeds)]
    for number, kind in enumerate((*IMPROVING, *STALLED)):
        runs = []
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            rng = np.random.default_rng([seed, number])
            runs.append(delays(arm, PATIENCE, [draw(kind, rng) for _ in range(n)]))
        if kind in IMPROVING:
            result["false_alarms"][kind] = [sum(delay is not None for delay in run) for run in runs]
            continue
        hits = [[caught(delay, PATIENCE) for delay in run] for run in runs]
        if kind != "overfitting":
            every = [flags + run_hits for flags, run_hits in zip(every, hits, strict=True)]
        late = [delay for run in runs for delay in run if delay is not None and delay >= 0]
        result["caught"][kind] = {
            "rates": [share(run_hits) for run_hits in hits],
            "early": share([delay is not None and delay < 0 for run in runs for delay in run]),
            "delay_median": float(np.median(late)) if late else None,
            "delay_95": round(float(np.percentile(late, 95)), 1) if late else None,
        }
    result["caught"]["flat or oscillating"] = {"rates": [share(flags) for flags in every]}
    return result


def over_ratio(arm: str, n: int) -> list[dict[str, float | None]]:
    """False alarms per curve and catches against improvement / sigma, for several patiences."""
    rows: list[dict[str, float | None]] = []
    for patience in PATIENCES:
        for ratio in RATIOS:
            rng = np.random.default_rng([FIRST_SEED, patience, int(100 * ratio)])
            alarms = delays(arm, patience, [at_ratio(ratio, False, rng) for _ in range(n)])
            stalls = delays(arm, patience, [at_ratio(ratio, True, rng) for _ in range(n)])
            fair = [delay for delay in stalls if delay is None or delay >= 0]  # a false alarm before is counted above
            rows.append(
                {
                    "patience": patience,
                    "ratio": ratio,
                    "false_alarm": share([delay is not None for delay in alarms]),
                    "caught": share([caught(delay, patience) for delay in fair]) if fair else None,
                }
            )
    return rows


def run(n: int, seeds: int) -> dict[str, Any]:
    """The whole benchmark as plain data."""
    return {
        "setting": {"patience": PATIENCE, "everything_else": "defaults", "caught_within": PATIENCE + 2},
        "curves_per_kind_and_seed": n,
        "seeds": list(range(FIRST_SEED, FIRST_SEED + seeds)),
        "slowest_improvement_in_sigma": SLOWEST,
        "families": FAMILIES,
        "arms": {arm: headline(arm, n, seeds) for arm in ARMS},
        "over_ratio": {arm: over_ratio(arm, n) for arm in ARMS if "smoothing" not in arm},
    }


def show(result: dict[str, Any]) -> None:
    n = result["curves_per_kind_and_seed"]
    print(f"patience {PATIENCE}, defaults, {n} curves per kind and seed, seeds {result['seeds']}\n")
    for name, text in FAMILIES.items():
        print(f"  {name}: {text}")
    for arm, numbers in result["arms"].items():
        print(f"\n{arm}\n  {'improving curves':32} false alarms of {n}, by seed")
        for kind, counts in numbers["false_alarms"].items():
            print(f"  {kind:32} {counts}")
        print(f"  {'stalled curves':32} caught in {PATIENCE + 2}: worst to best seed; delay median, 95 %")
        for kind, row in numbers["caught"].items():
            late = f"{row['delay_median']}, {row['delay_95']}" if "delay_95" in row else ""
            print(f"  {kind:32} {min(row['rates']):6.1%} to {max(row['rates']):6.1%}   {late}")
    for arm, rows in result["over_ratio"].items():
        print(f"\n{arm}: false alarm on 30 validations / caught within patience + 2, by improvement / sigma")
        print("  patience " + "".join(f"{ratio:>14g}" for ratio in RATIOS))
        for patience in PATIENCES:
            line = f"  {patience:<9}"
            for row in (row for row in rows if row["patience"] == patience):
                hits = "-" if row["caught"] is None else f"{row['caught']:.1%}"
                line += f"{row['false_alarm']:.1%}/{hits}".rjust(14)
            print(line)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--curves", type=int, default=200, help="curves of each kind")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, each with all curves")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="where the JSON goes")
    arguments = parser.parse_args(argv)
    result = run(arguments.curves, arguments.seeds)
    show(result)
    text = json.dumps(result, indent=1)
    short = re.sub(r"[\[{][^\[\]{}]{,200}[\]}]", lambda found: " ".join(found[0].split()), text)  # one row, one line
    arguments.out.write_text(short + "\n")


if __name__ == "__main__":
    main()
