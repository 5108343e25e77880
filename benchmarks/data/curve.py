"""How far do learning curves hold? Fitted on small sizes, judged at up to ten times the largest of them.

    python benchmarks/data/curve.py

Takes the scores in `curve_scores.csv` (`curve_scores.py` trains them), three seeds a size. Of each curve the sizes up
to a tenth of the largest are fitted, and all above are held out. Beside `fit_learning_curve`, on the same means: the
same law by least squares (c, a and b free, c within the metric's bounds), a power law without c, and a line over log n.

`curve.csv` has a row for each curve and metric: the truth at the largest size (mean of three fits), what each method
says of it, the 90 % band, and of how many held-out sizes the band holds the mean of the three fits. Errors of accuracy
are in points, those of the negative log likelihood in hundredths of a nat.

The priors were chosen by the curves of DEVELOPMENT. The last choice, that c is likely near the best error, was made
when the first three tasks of the test had been looked at; both parts are shown.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from lightning_tips.data import fit_learning_curve

HERE = Path(__file__).parent
DEVELOPMENT = ("clothes10/logistic", "clothes10/mlp", "pullover_or_coat/forest", "shirt_or_tshirt/mlp")
MODES = {"accuracy": "max", "nll": "min"}
Array = NDArray[np.float64]


def log_linear(n: Array, error: Array) -> Callable[[Array], Array]:
    line = np.polyfit(np.log(n), error, 1)
    return lambda m: line[0] * np.log(m) + line[1]


def power_law(n: Array, error: Array) -> Callable[[Array], Array]:
    line = np.polyfit(np.log(n), np.log(error), 1)
    return lambda m: np.exp(line[0] * np.log(m) + line[1])


def least_squares(n: Array, error: Array) -> Callable[[Array], Array]:
    def law(m: Array, c: float, a: float, b: float) -> Array:
        return c + a * (m / n[-1]) ** -b

    start = (error[-1] / 2, error[-1] / 2, 0.4)
    bounds = ([0, 0, 0.01], [error.max(), np.inf, 5])
    found = optimize.least_squares(lambda p: law(n, *p) - error, start, bounds=bounds, max_nfev=20_000).x
    return lambda m: law(m, *found)


METHODS = {"log_linear": log_linear, "power_law": power_law, "least_squares": least_squares}


def judge(scores: dict[int, list[float]], metric: str) -> dict[str, Any]:
    """One curve: fitted on the sizes up to a tenth of the largest, judged on the others."""
    sizes = sorted(scores)
    fitted = [n for n in sizes if n <= sizes[-1] / 10]
    held = [n for n in sizes if n > fitted[-1]]
    mode = cast(Literal["max", "min"], MODES[metric])
    curve = fit_learning_curve(
        [n for n in fitted for _ in scores[n]], [value for n in fitted for value in scores[n]], mode
    )
    largest = held[-1]
    truth = statistics.fmean(scores[largest])
    row: dict[str, Any] = {
        "fitted": f"{fitted[0]}-{fitted[-1]}",
        "largest": largest,
        "truth": truth,
        "truth_sd": statistics.stdev(scores[largest]) if len(scores[largest]) > 1 else 0.0,
        "abstains": curve.reason or "",
    }
    if not curve.abstains:
        bands = {n: curve.interval(n, fits=len(scores[n])) for n in held}
        row |= {"curve": curve.predict(largest), "low": bands[largest][0], "high": bands[largest][1]}
        row["held"] = sum(low <= statistics.fmean(scores[n]) <= high for n, (low, high) in bands.items())
    row["of"] = len(held)
    n = np.array(fitted, float)
    means = np.array([statistics.fmean(scores[size]) for size in fitted])
    error = 1 - means if mode == "max" else means
    for name, method in METHODS.items():
        expected = float(method(n, error)(np.array([float(largest)]))[0])
        row[name] = 1 - expected if mode == "max" else expected
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the rows that do not abstain: mean absolute errors at the largest size, and the share that the band holds."""
    told = [row for row in rows if not row["abstains"]]
    if not told:
        return {"curves": len(rows), "abstained": len(rows)}
    names = ("curve", *METHODS)
    errors = {name: [100 * abs(row[name] - row["truth"]) for row in told] for name in names}
    return {
        "curves": len(rows),
        "abstained": len(rows) - len(told),
        "mean_error": {name: round(statistics.fmean(errors[name]), 3) for name in names},
        "largest_error": {name: round(max(errors[name]), 3) for name in names},
        "band_holds": round(sum(row["held"] for row in told) / sum(row["of"] for row in told), 3),
        "band_width": round(statistics.fmean(100 * (row["high"] - row["low"]) for row in told), 3),
        "better_than_log_linear": sum(a < b for a, b in zip(errors["curve"], errors["log_linear"], strict=True)),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, default=HERE / "curve_scores.csv")
    parser.add_argument("--out", type=Path, default=HERE / "curve.csv")
    chosen = parser.parse_args(arguments)
    scores: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: {m: defaultdict(list) for m in MODES})
    with chosen.scores.open(newline="") as file:
        for row in csv.DictReader(file):
            for metric in MODES:
                if row[metric]:
                    scores[f"{row['task']}/{row['learner']}"][metric][int(row["n"])].append(float(row[metric]))
    rows = []
    for name, metrics in scores.items():
        for metric, by_size in metrics.items():
            if not by_size:
                continue
            split = "development" if name in DEVELOPMENT else "test"
            rows.append({"curve_of": name, "metric": metric, "split": split} | judge(by_size, metric))
            told = rows[-1]
            if told["abstains"]:
                print(f"{name} {metric}: abstains, {told['abstains']}")
                continue
            print(
                f"{split:11} {name:26} {metric:8} {told['largest']:6}  truth {told['truth']:.4f}  curve"
                f" {told['curve']:.4f} ({told['low']:.4f} to {told['high']:.4f}, holds {told['held']} of {told['of']})"
                f"  log-linear {told['log_linear']:.4f}  power {told['power_law']:.4f}  least squares"
                f" {told['least_squares']:.4f}"
            )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with chosen.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    result: dict[str, Any] = {"machine": f"{platform.machine()}, numpy {np.__version__}"}
    for split in ("test", "development"):
        for metric in MODES:
            part = [row for row in rows if row["split"] == split and row["metric"] == metric]
            if part:
                result[f"{split} {metric}"] = summary(part)
    result["all"] = summary(rows)
    chosen.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
