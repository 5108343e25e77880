"""What a sampler draws from: the shares that each mix gives, and bins of regression targets."""

import numpy as np
import pytest
import torch

from lightning_tips.imbalance import (
    ImbalancedSampler,
    bin_targets,
    class_counts,
    default_num_samples,
    target_mix,
)

from sampled import LABELS

# ---- shares


def test_mixes_are_those_of_the_papers() -> None:
    counts = np.array([1000, 100, 10])
    assert target_mix(counts, "sqrt") == pytest.approx(np.sqrt(counts) / np.sqrt(counts).sum())
    weights = (1 - 0.99) / (1 - 0.99**counts) * counts
    assert target_mix(counts, "effective", beta=0.99) == pytest.approx(weights / weights.sum())
    assert target_mix(counts, "effective", beta=0.0) == pytest.approx(counts / counts.sum())
    factors = np.maximum(1, np.sqrt(0.1 / (counts / 1110)))
    mix = target_mix(counts, "repeat_factor", threshold=0.1)
    assert mix == pytest.approx(counts * factors / (counts * factors).sum())
    assert default_num_samples(counts, mix, "repeat_factor") == int(np.ceil((counts * factors).sum()))
    assert target_mix(counts, [2, 1, 1]).tolist() == [0.5, 0.25, 0.25]
    assert target_mix(counts, {"0": 2, "1": 1, "2": 1}).tolist() == [0.5, 0.25, 0.25]
    assert target_mix([5, 0, 5], {0: 1, 2: 3}).tolist() == [0.25, 0, 0.75]


@pytest.mark.parametrize(
    ("counts", "arguments", "message"),
    [
        ([5, 0, 5], {"strategy": "sqrt"}, "Classes without samples: 1 of 3. Number the classes from 0 without gaps"),
        ([5], {"strategy": "sqrt"}, "one class only"),
        ([5, -1], {"strategy": "sqrt"}, "number of samples of each class, 0 or more"),
        ([5, 5], {"strategy": "oversampel"}, "Did you mean 'oversample'"),
        ([5, 5], {"strategy": "effective", "beta": 1.0}, "beta=1.0 must be at least 0 and below 1"),
        ([5, 5], {"strategy": "repeat_factor", "threshold": 0.0}, "threshold=0.0 must be above 0"),
        ([5, 5], {"strategy": {0: 1, 7: 1}}, r"names classes \[7\], but the labels only have 0 to 1"),
        ([5, 5], {"strategy": {0: 1, "cat": 1}}, "'cat' is no class id"),
        ([5, 5], {"strategy": {0: 1}}, "does not say how much of classes 1 to draw"),
        ([5, 5], {"strategy": {0: 1, 1: -1}}, "finite weights of 0 or more"),
        ([5, 5], {"strategy": [1, float("nan")]}, "finite weights of 0 or more"),
        ([5, 5], {"strategy": [1, 1, 1]}, "there are 2 classes: give one each"),
        ([5, 5], {"strategy": [0, 1]}, "fewer than two classes"),
        ([5, 0], {"strategy": [1, 1]}, "wants classes 1, which have no samples"),
    ],
)
def test_wrong_mixes_say_what_to_do(counts, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        target_mix(counts, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed=-1 must be 0 or more"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"num_replicas": 2, "rank": 2}, "rank=2 must be below num_replicas=2"),
        ({"num_replicas": 0}, "num_replicas=0 is too low"),
        ({"labels": [0, 2, 2]}, "Classes without samples: 1"),
        ({"labels": [0, 0, 0]}, "one class only"),
    ],
)
def test_wrong_arguments_say_so(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ImbalancedSampler(**{"labels": LABELS} | arguments)
    with pytest.raises(ValueError, match="epoch=-1"):
        ImbalancedSampler(LABELS).set_epoch(-1)


# ---- labels


def test_bins_of_regression_targets() -> None:
    values = np.random.default_rng(0).exponential(size=1000)
    assert class_counts(bin_targets(values, 4)).tolist() == [250] * 4
    wide = bin_targets(torch.from_numpy(values)[:, None], 4, "width")
    assert (np.diff(class_counts(wide)) < 0).all()
    assert bin_targets([0.0, 1.0, 2.0, 9.0], [0.5, 5.0]).tolist() == [0, 1, 1, 2]
    assert bin_targets([0.0, 0.0, 0.0, 9.0], 3, "width").tolist() == [0, 0, 0, 1]  # no gaps
    assert len(ImbalancedSampler(wide)) == 4 * class_counts(wide).max()
    for arguments in ({"bins": 1}, {"bins": [2, 1]}, {"method": "equal"}, {"values": [1.0, float("nan")]}):
        with pytest.raises(ValueError, match=r"."):
            bin_targets(**{"values": [1.0, 2.0]} | arguments)
    with pytest.raises(ValueError, match="one bin"):
        bin_targets([1.0, 1.0])
