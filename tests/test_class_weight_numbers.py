"""Class weights as numbers: what they come to, and what a batch makes of their ratio."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_tips.imbalance import class_weights, weighted_cross_entropy

ROOT = Path(__file__).parent.parent


# ---- the numbers


@pytest.mark.parametrize("scheme", ["inverse", "sqrt", "effective", "none"])
@pytest.mark.parametrize("counts", [[1000, 50], [3000, 900, 100, 30], [1, 1]])
def test_weights_have_mean_one_over_samples(scheme, counts) -> None:
    weights = class_weights(counts, scheme)
    assert weights.dtype == torch.float32
    assert float((weights.double() * torch.tensor(counts)).sum() / sum(counts)) == pytest.approx(1.0, abs=1e-6)


def test_ratios_of_the_schemes() -> None:
    def ratio(*args: Any) -> float:
        weights = class_weights([1000, 50], *args)
        return float(weights[1] / weights[0])

    assert ratio() == pytest.approx(20)
    assert ratio("sqrt") == pytest.approx(20**0.5)
    assert ratio("none") == 1
    assert ratio("effective", 0.999) == pytest.approx((1 - 0.999**1000) / (1 - 0.999**50))
    assert ratio("effective", 0.0) == 1
    assert ratio("effective", 1 - 1e-9) == pytest.approx(20, rel=1e-3)


@pytest.mark.parametrize("counts", [np.array([5, 10]), torch.tensor([5, 10]), (5.0, 10.0), [5, 10]])
def test_counts_of_any_form(counts) -> None:
    assert class_weights(counts).tolist() == pytest.approx([1.5, 0.75])


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([5, 0, 3, 0], {}, "No samples of class 1, 3"),
        ([5], {}, "nothing to balance with 1 class"),
        ([5, -1], {}, "not negative"),
        ([5, math.nan], {}, "finite"),
        ([5, math.inf], {}, "finite"),
        ([[1, 2], [3, 4]], {}, "one number for each class"),
        ([5, 3], {"scheme": "invers"}, "Did you mean 'inverse'"),
        ([5, 3], {"beta": 1.0}, r"beta must lie in \[0, 1\)"),
        ([5, 3], {"beta": math.nan}, "beta"),
    ],
)
def test_bad_counts(counts, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        class_weights(counts, **options)


# ---- the ratio, which is what this is about


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("batch_size", "stock"), [(8, 6.6), (32, 14.3), (128, 18.5)])
def test_effective_ratio(batch_size: int, stock: float, ranks: int) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks" / "imbalance"))
    try:
        from ratio import effective_ratio
    finally:
        sys.path.pop(0)
    weights = class_weights([20, 1])
    batches = 12_000 // batch_size // ranks
    ours, _ = effective_ratio(lambda x, y: weighted_cross_entropy(x, y, weights), batch_size, ranks, batches)
    assert ours == pytest.approx(20, rel=0.02)
    torchs, _ = effective_ratio(lambda x, y: F.cross_entropy(x, y, weight=weights), batch_size, ranks, batches)
    assert torchs == pytest.approx(stock, rel=0.1)


def test_committed_ratios_are_within_two_percent() -> None:
    rows = json.loads((ROOT / "benchmarks/imbalance/ratio.json").read_text())["rows"]
    assert [(r["ranks"], r["batch_per_rank"]) for r in rows] == [(n, b) for n in (1, 2) for b in (8, 32, 128)]
    for row in rows:
        assert row["ours"] == pytest.approx(20, rel=0.02)
