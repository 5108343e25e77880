"""Labels of imbalanced classes, as arrays, for tests of samplers."""

from typing import Any

import numpy as np

from lightning_tips.imbalance import ImbalancedSampler

COUNTS = [700, 203, 90, 7]
NAMES = ["oversample", "undersample", "sqrt", "effective", "repeat_factor", {0: 1, 1: 2, 2: 3, 3: 4}]


def labels_of(counts=COUNTS, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


LABELS = labels_of()


def visits(sampler: ImbalancedSampler, items: Any, size: int = len(LABELS)) -> np.ndarray:
    return np.bincount(np.asarray(items), minlength=size)
