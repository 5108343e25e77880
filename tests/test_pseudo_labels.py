"""Pseudo-labels: the choice, the draw, the samples, and the guard."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_tips.core.lightning_private import with_dataset
from lightning_tips.data import (
    MixedSampler,
    SupervisedGuard,
    as_probabilities,
    choose_pseudo_labels,
    draw_mixed,
    draw_weighted,
)
from lightning_tips.data.mixed_loader import RelabelledDataset
from lightning_tips.data.pseudo_report import warn_of_odd_labels

# ---- the choice


def some_probabilities(samples: int = 200, classes: int = 4, favour: float = 0.0) -> Tensor:
    logits = 3 * torch.randn(samples, classes, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += favour
    return logits.softmax(1)


def test_confident_samples_get_their_most_likely_class() -> None:
    probabilities = some_probabilities()
    chosen = choose_pseudo_labels(probabilities, 0.9)
    confidence, labels = probabilities.max(1)
    assert chosen.indices.tolist() == torch.nonzero(confidence >= 0.9).flatten().tolist()
    assert torch.equal(chosen.labels, labels[chosen.indices])
    assert chosen.weights.unique().tolist() == [1.0]


def test_thresholds_of_each_class_and_the_most_confident_of_each() -> None:
    probabilities = some_probabilities()
    never = choose_pseudo_labels(probabilities, [1.0, 0.5, 0.5, 0.5])
    assert 0 not in never.labels
    some = choose_pseudo_labels(probabilities, 0.0, per_class=7)
    assert torch.bincount(some.labels).tolist() == [7] * 4
    confidence, labels = probabilities.max(1)
    kept = confidence[some.indices][some.labels == 2].min()
    dropped = [i for i in torch.nonzero(labels == 2).flatten().tolist() if i not in some.indices.tolist()]
    assert kept >= confidence[dropped].max()
    half = choose_pseudo_labels(probabilities, 0.0, top_share=0.5)
    assert torch.bincount(half.labels).tolist() == (torch.bincount(labels) // 2).tolist()


def test_weights_give_each_class_its_share() -> None:
    chosen = choose_pseudo_labels(some_probabilities(favour=2.0), 0.5, prior=[1, 1, 1, 3], max_weight=100)
    of_class = torch.zeros(4).index_add_(0, chosen.labels, chosen.weights)
    assert torch.allclose(of_class / of_class.sum(), torch.tensor([1, 1, 1, 3]) / 6)
    assert chosen.weights.mean() == pytest.approx(1)


def test_no_weight_is_above_the_limit() -> None:
    probabilities = torch.tensor([[0.99, 0.01]] * 98 + [[0.01, 0.99]] * 2)
    chosen = choose_pseudo_labels(probabilities, 0.9, prior=[1, 1], max_weight=4)
    assert chosen.weights.max() == pytest.approx(4, rel=1e-5)
    assert chosen.weights.mean() == pytest.approx(1)


def test_alignment_takes_the_teachers_preference_back() -> None:
    probabilities = some_probabilities(favour=3.0)
    plain = torch.bincount(choose_pseudo_labels(probabilities, 0.0).labels, minlength=4)
    aligned = torch.bincount(choose_pseudo_labels(probabilities, 0.0, prior=[1] * 4, align=True).labels, minlength=4)
    assert plain.max() > 1.3 * aligned.max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"threshold": [0.5, 0.5]}, "each of 4 classes"),
        ({"top_share": 0.0}, "top_share"),
        ({"per_class": 0}, "per_class"),
        ({"prior": [1.0]}, "prior"),
        ({"align": True}, "needs a prior"),
        ({"max_weight": 0.5}, "max_weight"),
    ],
)
def test_choice_refuses_what_makes_no_sense(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_pseudo_labels(some_probabilities(), **arguments)


def test_logits_are_no_probabilities() -> None:
    with pytest.raises(ValueError, match="softmax"):
        choose_pseudo_labels(torch.randn(4, 3))


def test_outputs_of_any_kind_become_probabilities() -> None:
    probabilities = some_probabilities(5)
    assert torch.equal(as_probabilities(probabilities), probabilities)
    assert torch.allclose(as_probabilities(probabilities.log()), probabilities, atol=1e-6)
    assert torch.allclose(as_probabilities({"logits": probabilities.log()}), probabilities, atol=1e-6)
    assert as_probabilities(torch.tensor([0.0, 2.0]))[:, 1].tolist() == pytest.approx([0.5, 0.8808], abs=1e-4)
    with pytest.raises(TypeError, match="list"):
        as_probabilities([1, 2])
    with pytest.raises(ValueError, match="not finite"):
        as_probabilities(torch.full((2, 3), float("nan")))
    with pytest.raises(ValueError, match="one class a sample"):
        as_probabilities(torch.zeros(2, 3, 8, 8))


# ---- the draw


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.7, 1.0])
def test_each_batch_has_its_share(share: float) -> None:
    mixed = draw_mixed(960, share)
    for batch in (7, 32, 64):
        counts = [int(mixed[at : at + batch].sum()) for at in range(0, 960 - batch, batch)]
        assert all(int(batch * share + 1e-9) <= count <= -int(-batch * share // 1) for count in counts)
    assert abs(mixed.sum() - 960 * share) < 1


def test_weighted_draw_is_exact_over_epochs() -> None:
    weights = np.array([1.0, 2.0, 0.0, 0.5])
    counts = sum(np.bincount(draw_weighted(7, weights, 0, epoch), minlength=4) for epoch in range(400))
    assert np.allclose(counts / counts.sum(), weights / weights.sum(), atol=0.01)
    assert set(np.bincount(draw_weighted(10, 4, 0, 0))) == {2, 3}


def test_any_number_of_ranks_draws_the_same_batches() -> None:
    def make(world: int, rank: int) -> MixedSampler:
        sampler = MixedSampler(40, 96, 8, seed=3, num_replicas=world, rank=rank)
        sampler.set_extra(np.arange(100, 130), 0.25, np.ones(30))
        sampler.set_epoch(2)
        return sampler

    alone = np.array(list(make(1, 0))).reshape(-1, 8)
    ranks = [np.array(list(make(2, rank))).reshape(-1, 8) for rank in (0, 1)]
    assert np.array_equal(np.stack(ranks, 1).reshape(-1, 8), alone)
    assert ((alone >= 100).sum(1) == 2).all()
    began_late = make(1, 0)
    began_late.set_position(2, 24)
    assert list(began_late) == alone.reshape(-1)[24:].tolist()


# ---- the samples


class Samples(Dataset):
    def __init__(self, samples: list) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "expected"),
    [
        ((1.0, 5), (2.0, 7), (2.0, 3)),
        ((1.0, 5), (2.0,), (2.0, 3)),
        ((1.0, 5), 2.0, (2.0, 3)),
        ((1.0, 5, "a"), (2.0, "b"), (2.0, 3, "b")),
        ({"x": 1.0, "y": 5}, {"x": 2.0}, {"x": 2.0, "y": 3}),
        ({"x": 1.0, "y": 5}, {"x": 2.0, "y": 9, "more": 1}, {"x": 2.0, "y": 3}),
        ({"x": 1.0, "y": 5}, 2.0, {"x": 2.0, "y": 3}),
    ],
)
def test_samples_of_any_form_get_a_label(labelled: Any, unlabelled: Any, expected: Any) -> None:
    data = RelabelledDataset(Samples([labelled] * 4), Samples([unlabelled] * 6))
    index = int(data.index_of(5, 3))
    assert data[index] == expected
    assert data.__getitems__([0, index, 1]) == [labelled, expected, labelled]
    assert len(data) == 4


def test_labels_keep_their_type_and_several_are_refused() -> None:
    data = RelabelledDataset(Samples([(1.0, torch.tensor([5.0]))]), Samples([2.0]))
    assert torch.equal(data[int(data.index_of(0, 1))][1], torch.tensor([1.0]))
    for label in (torch.zeros(3), [1, 0], np.zeros(4)):
        with pytest.raises(ValueError, match="label"):
            RelabelledDataset(Samples([(1.0, label)]), Samples([2.0]))
    with pytest.raises(ValueError, match="lacks"):
        RelabelledDataset(Samples([{"x": 1.0, "y": 5, "id": 3}]), Samples([{"x": 2.0}]))
    with pytest.raises(ValueError, match="3 parts"):
        RelabelledDataset(Samples([(1.0, 5, "a")]), Samples([2.0]))


def test_loader_gets_other_data_without_reading_the_old(tmp_path: Path) -> None:
    loader: DataLoader = DataLoader(TensorDataset(torch.arange(4)), batch_size=2)
    other = TensorDataset(torch.arange(10, 14))
    changed = with_dataset(loader, other, MixedSampler(4, 4, 2))
    assert sorted(torch.cat([b[0] for b in changed]).tolist()) == [10, 11, 12, 13]
    assert changed.batch_size == 2
    assert loader.dataset is not other


# ---- the guard


def test_guard_waits_and_takes_the_best_supervised_value() -> None:
    guard = SupervisedGuard(0.05, patience=2)
    for value in (0.5, 0.8, 0.7):
        guard.update(value, mixed=False)
    assert guard.reference == 0.8
    guard.update(0.6, mixed=True)
    assert not guard.hurts
    guard.update(0.76, mixed=True)
    assert not guard.hurts
    guard.update(0.7, mixed=True)
    guard.update(float("nan"), mixed=True)
    assert guard.hurts
    again = SupervisedGuard(0.05, patience=2)
    again.load_state_dict(guard.state_dict())
    assert again.hurts
    lower = SupervisedGuard(0.1, "min", 1, reference=1.0)
    lower.update(1.05, mixed=True)
    assert not lower.hurts
    lower.update(1.2, mixed=True)
    assert lower.hurts


def test_odd_labels_are_warned_of() -> None:
    labelled = torch.tensor([10, 10, 10])

    def warned(counts: list[int], size: int) -> str:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            warn_of_odd_labels("tip", torch.tensor(counts), labelled, size, 0.9)
        return " ".join(str(warning.message) for warning in seen)

    assert "only 0 of 100" in warned([0, 0, 0], 100)
    assert "tells nothing" in warned([34, 33, 33], 100)
    assert "95% of the pseudo-labels are of class 0" in warned([38, 1, 1], 100)
    assert not warned([20, 15, 10], 100)
