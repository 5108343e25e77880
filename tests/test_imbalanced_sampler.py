"""Sampling of imbalanced classes: exact, the same on any number of ranks, and a function of (seed, epoch, position)."""

import importlib.util
import itertools
import json
import pickle
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from lightning_tips.imbalance import (
    ImbalancedBatchSampler,
    ImbalancedSampler,
    bin_targets,
    class_counts,
    default_num_samples,
    find_labels,
    target_mix,
)
from lightning_tips.imbalance.draw import EpochOrder, build_pool, epoch_quotas, permute

from harness import build
from processes import on_two_ranks

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")  # Python >= 3.12

COUNTS = [700, 203, 90, 7]
NAMES = ["oversample", "undersample", "sqrt", "effective", "repeat_factor", {0: 1, 1: 2, 2: 3, 3: 4}]


def labels_of(counts=COUNTS, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


LABELS = labels_of()


def visits(sampler: ImbalancedSampler, items: Any, size: int = len(LABELS)) -> np.ndarray:
    return np.bincount(np.asarray(items), minlength=size)


# ---- the draw


@pytest.mark.parametrize("strategy", NAMES, ids=str)
@pytest.mark.parametrize("num_samples", [None, 10, 777, 200_000])
def test_each_class_gets_its_share_and_each_item_floor_or_ceil(strategy, num_samples) -> None:
    sampler = ImbalancedSampler(LABELS, strategy, num_samples=num_samples)
    for epoch in (0, 1):
        seen = visits(sampler, sampler.indices(epoch))
        assert seen.sum() == sampler.epoch_size
        drawn = np.bincount(LABELS, weights=seen)
        assert (np.abs(drawn - sampler.draws_per_class()) < 1).all()
        for label, quota in enumerate(drawn):
            of_class = seen[label == LABELS]
            assert of_class.min() == quota // len(of_class)
            assert of_class.max() == -(-quota // len(of_class))


def test_oversampling_shows_every_sample_and_the_largest_class_once() -> None:
    sampler = ImbalancedSampler(LABELS)
    seen = visits(sampler, list(sampler))
    assert len(sampler) == 4 * 700
    assert (seen[LABELS == 0] == 1).all()
    assert (seen[LABELS == 3] == 100).all()


def test_undersampling_repeats_nothing_and_draws_others_each_epoch() -> None:
    sampler = ImbalancedSampler(LABELS, "undersample")
    epochs = [sampler.indices(epoch) for epoch in range(400)]
    assert all(len(np.unique(e)) == len(e) == 28 for e in epochs)
    common = [len(np.intersect1d(a, b)) for a, b in itertools.pairwise(epochs)]
    assert np.mean(common) < 7 + 2  # the rare class is all drawn, of the others hardly any twice
    seen = visits(sampler, np.concatenate(epochs))
    largest = seen[LABELS == 0]
    assert largest.mean() == 400 * 7 / 700
    assert largest.var() == pytest.approx(4, rel=0.25)  # that of independent epochs


def test_many_rounds_over_a_tiny_class_stay_exact() -> None:
    sampler = ImbalancedSampler(labels_of([100_000, 3]), num_samples=200_001)
    seen = np.bincount(sampler.indices(0))
    assert sorted(seen[seen > 2]) in ([33_333, 33_333, 33_334], [33_333, 33_334, 33_334], [33_334] * 3, [33_333] * 3)
    assert len(EpochOrder(sampler._pool, epoch_quotas(sampler.mix, 200_001, 0, 0), 0, 0)._spans) < 200


def test_less_than_one_draw_an_epoch_comes_out_right_over_the_epochs() -> None:
    quotas = np.sum([epoch_quotas(np.array([0.97, 0.02, 0.01]), 10, 0, epoch) for epoch in range(3000)], 0)
    assert quotas.sum() == 30_000
    assert quotas[1:] == pytest.approx([600, 300], rel=0.15)


def test_order_is_well_mixed_over_classes_and_items() -> None:
    labels = labels_of([60_000, 20_000, 300])
    sampler = ImbalancedSampler(labels, num_samples=150_000)
    drawn = labels[sampler.indices(0)]
    windows = drawn[: 150_000 // 500 * 500].reshape(-1, 500)
    for label in range(3):
        of_window = (windows == label).sum(1)
        assert of_window.mean() == pytest.approx(500 / 3, rel=0.02)
        assert of_window.std() == pytest.approx(np.sqrt(500 * 2 / 9), rel=0.2)  # that of independent draws
    followers = np.histogram2d(drawn[:-1], drawn[1:], bins=3)[0]
    expected = len(drawn) / 9
    assert ((followers - expected) ** 2 / expected).sum() < 30
    # Where in the epoch an item comes says nothing about where it comes in the next one.
    places = [np.argsort(ImbalancedSampler([0] * 5000 + [1] * 5000).indices(e)) for e in range(2)]
    assert abs(np.corrcoef(places)[0, 1]) < 0.05
    assert abs(np.corrcoef(places[0], np.arange(10_000))[0, 1]) < 0.05


@pytest.mark.parametrize("word", [np.uint32, np.uint64])
def test_permutations_are_permutations_without_a_pattern(word) -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 7, 100, 1000, 65_537):
        tries = max(1, 200_000 // size)
        keys = rng.integers(0, np.iinfo(word).max, tries, dtype=word)
        x = np.tile(np.arange(size, dtype=word), tries)
        y = permute(x, keys, np.full(tries, size), np.full(tries, size)).reshape(tries, size).astype(np.int64)
        assert (np.sort(y, 1) == np.arange(size)).all()
        if size < 100:
            continue
        cells = np.histogram2d(x, y.ravel(), bins=10, range=((0, size), (0, size)))[0]
        assert ((cells - cells.mean()) ** 2 / cells.mean()).sum() < 200  # 81 degrees of freedom
        for apart in (1, int(np.ceil(np.sqrt(size)))):
            steps = ((y[:, apart:] - y[:, :-apart]) % size - 1) * 20 // (size - 1)
            cells = np.bincount(steps.ravel(), minlength=20)
            cells = cells / np.bincount(np.arange(size - 1) * 20 // (size - 1))
            # What six rounds leave in a class of a hundred is 7 %, and noise is 3 %.
            assert np.abs(cells / cells.mean() - 1).max() < (0.1 if size == 100 else 0.05)


def test_pairs_of_one_class_meet_in_an_undersampled_epoch_as_chance_has_it() -> None:
    sampler = ImbalancedSampler([0] * 30 + [1] * 15, "undersample")
    seen = np.array([np.bincount(sampler.indices(e), minlength=45)[:30] for e in range(1000)])
    assert (seen.sum(1) == 15).all()
    pairs = (seen.T @ seen)[np.triu_indices(30, 1)]
    expected = 1000 * 15 * 14 / (30 * 29)
    assert ((pairs - expected) ** 2).mean() / (expected * (1 - expected / 1000)) == pytest.approx(1, abs=0.5)


# ---- a function of (seed, epoch, position)


@pytest.mark.parametrize("strategy", NAMES, ids=str)
def test_all_numbers_of_ranks_draw_the_same(strategy) -> None:
    alone = ImbalancedSampler(LABELS, strategy, num_samples=200_000).indices(3)
    for world in (2, 8):
        ranks = [
            ImbalancedSampler(LABELS, strategy, num_samples=200_000, num_replicas=world, rank=rank).indices(3)
            for rank in range(world)
        ]
        assert (np.stack(ranks, 1).ravel() == alone).all()


@pytest.mark.parametrize("size", [3, 10, 65_537])
@pytest.mark.parametrize("world", [2, 7, 8])
def test_epoch_that_does_not_divide_is_padded_or_cut(size, world) -> None:
    alone = ImbalancedSampler(LABELS, num_samples=size).indices(0)
    for drop_last in (False, True):
        ranks = [ImbalancedSampler(LABELS, "oversample", size, 0, world, rank, drop_last) for rank in range(world)]
        drawn = [list(rank) for rank in ranks]
        assert [len(d) for d in drawn] == [len(r) for r in ranks]
        assert len({len(r) for r in ranks}) == 1
        together = np.array(drawn).T.ravel()
        assert len(together) == ranks[0].total_size == (size // world if drop_last else -(-size // world)) * world
        assert (together == np.resize(alone, len(together))).all()


def test_seed_and_epoch_choose_the_order() -> None:
    orders = {tuple(ImbalancedSampler(LABELS, seed=seed).indices(epoch)[:50]) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    first = ImbalancedSampler(LABELS, seed=1)
    first.set_epoch(2)
    assert list(first) == list(first) == ImbalancedSampler(LABELS.tolist(), seed=1).indices(2).tolist()


def test_stray_random_draws_change_nothing_and_none_are_made() -> None:
    before = ImbalancedSampler(LABELS).indices(0)
    torch.rand(3), np.random.rand(3), random.random()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert (ImbalancedSampler(LABELS).indices(0) == before).all()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("position", [0, 1, 65_535, 65_536, 66_000])
def test_beginning_in_the_middle_equals_slicing(world, position) -> None:
    sampler = ImbalancedSampler(LABELS, num_samples=200_001, num_replicas=world, rank=world - 1)
    whole = sampler.indices(4)
    sampler.set_position(4, position)
    assert list(sampler) == whole[position:].tolist()
    assert list(sampler) == whole.tolist()  # once only
    assert (sampler.indices(4, position, position + 70_000) == whole[position : position + 70_000]).all()
    assert len(sampler) == len(whole)


def test_position_counts_for_its_epoch_only() -> None:
    sampler = ImbalancedSampler(LABELS)
    sampler.set_position(2, 100)
    sampler.set_epoch(2)  # as Lightning does
    assert len(list(sampler)) == len(sampler) - 100
    sampler.set_position(2, 100)
    sampler.set_epoch(3)
    assert len(list(sampler)) == len(sampler)
    sampler.set_position(2, len(sampler))
    assert list(sampler) == []
    with pytest.raises(ValueError, match="position=9999 must lie in an epoch of 2800"):
        sampler.set_position(2, 9999)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_goes_on_where_it_was(workers) -> None:
    data = TensorDataset(torch.arange(len(LABELS)), torch.from_numpy(LABELS))
    sampler = ImbalancedSampler(data, num_samples=96)
    loader = DataLoader(data, batch_size=16, sampler=sampler, num_workers=workers)
    sampler.set_epoch(1)
    whole = [batch[0].tolist() for batch in loader]
    assert list(itertools.chain(*whole)) == sampler.indices(1).tolist()
    sampler.set_position(1, 48)
    assert [batch[0].tolist() for batch in loader] == whole[3:]


def test_pickled_sampler_draws_the_same() -> None:
    sampler = ImbalancedSampler(LABELS)
    sampler.set_epoch(3)
    drawn = list(sampler)
    packed = pickle.dumps(sampler)
    assert len(packed) < 4 * len(LABELS) + 3000
    assert list(pickle.loads(packed)) == drawn


def test_ranks_are_asked_for_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = ImbalancedSampler(LABELS)
    assert (sampler.num_replicas, sampler.rank, len(sampler)) == (1, 0, 2800)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    assert (sampler.num_replicas, sampler.rank, len(sampler)) == (4, 3, 700)
    assert list(sampler) == ImbalancedSampler(LABELS, num_replicas=1, rank=0).indices(0)[3::4].tolist()


def test_several_labels_a_sample_are_drawn_by_the_rarest() -> None:
    labels = np.zeros((1000, 3), np.int64)
    labels[:, 0] = np.arange(1000) < 900
    labels[:100, 1] = 1
    labels[:10, 2] = 1
    sampler = ImbalancedSampler(labels, "repeat_factor", threshold=0.4)
    assert sampler.counts.tolist() == [900, 100, 10]
    mean = np.mean([visits(sampler, sampler.indices(e)) for e in range(50)], 0)
    assert mean[:10] == pytest.approx(np.sqrt(0.4 / 0.01), rel=0.03)
    assert mean[10:100] == pytest.approx(np.sqrt(0.4 / 0.1), rel=0.03)
    assert mean[100:] == pytest.approx(1, abs=0.05)  # the frequent label, and samples without any
    balanced = ImbalancedSampler(torch.tensor(labels), "oversample")
    assert visits(balanced, balanced.indices(0))[:10].sum() == len(balanced) / 4
    one_hot = np.eye(4, dtype=np.int64)[LABELS]
    assert ImbalancedSampler(one_hot).mix.tolist() == [0.25] * 4
    assert ImbalancedSampler(labels, [0, 0, 1, 1]).mix.tolist() == [0, 0, 0.5, 0.5]


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


class Plain(Dataset):
    """Keeps its labels to itself, and draws random numbers for each sample."""

    def __init__(self, labels, make=lambda x, y: (x, y)) -> None:
        self.hidden, self.make, self.reads = list(labels), make, 0

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.make(torch.rand(2) + random.random() + np.random.rand(), self.hidden[index])


class Kept(Plain):
    def __init__(self, name, labels) -> None:
        super().__init__(range(len(LABELS)))
        setattr(self, name, labels)


@pytest.mark.parametrize(
    "labels",
    [
        LABELS.tolist(),
        LABELS.astype(np.uint8),
        LABELS.astype(np.int16)[:, None],
        LABELS.astype(np.uint64),
        torch.from_numpy(LABELS).int(),
        torch.from_numpy(LABELS).to(torch.uint8),
        [torch.tensor(int(label)) for label in LABELS],
    ],
)
def test_labels_in_any_form(labels) -> None:
    for dataset in (Kept("targets", labels), Kept("labels", labels)):
        assert find_labels(dataset).tolist() == LABELS.tolist()
        assert not dataset.reads
    assert ImbalancedSampler(labels).indices(0).tolist() == ImbalancedSampler(LABELS).indices(0).tolist()
    assert class_counts(labels).tolist() == COUNTS


def test_labels_of_two_classes_as_bool_and_as_a_binary_loss_wants_them() -> None:
    for labels in ([True, False, False], torch.tensor([1.0, 0.0, 0.0]), torch.tensor([[1], [0], [0]]).bfloat16()):
        assert class_counts(labels).tolist() == [2, 1]


def test_labels_of_combined_datasets() -> None:
    tensors = TensorDataset(torch.zeros(len(LABELS), 2), torch.from_numpy(LABELS))
    both = ConcatDataset(
        [Subset(tensors, range(0, 100, 2)), Kept("targets", LABELS), Subset(Subset(tensors, [5, 4]), [1])]
    )
    expected = [*LABELS[:100:2], *LABELS, LABELS[4]]
    assert find_labels(both).tolist() == expected
    assert find_labels(Subset(both, torch.tensor([49, 50]))).tolist() == expected[49:51]
    hidden = Plain([0, 1, 1, 0, 2])
    assert find_labels(Subset(hidden, [4, 1]), progress=False).tolist() == [2, 1]
    assert hidden.reads == 2


def test_labels_of_a_folder_of_images(tmp_path: Path) -> None:
    from PIL import Image

    for name, number in (("cat", 3), ("dog", 1)):
        (tmp_path / name).mkdir()
        for i in range(number):
            Image.new("L", (2, 2)).save(tmp_path / name / f"{i}.png")
    folder = ImageFolder(str(tmp_path))
    assert find_labels(folder).tolist() == [0, 0, 0, 1]
    del folder.targets
    assert find_labels(folder).tolist() == [0, 0, 0, 1]
    turned = ImageFolder(str(tmp_path), target_transform=lambda label: 1 - label)
    assert find_labels(turned).tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda x, y: (x, y), None),
        (lambda x, y: [x, torch.tensor(y)], None),
        (lambda x, y: {"image": x, "label": y}, None),
        (lambda x, y: {"image": x, "kind": np.int64(y)}, "kind"),
    ],
)
def test_hidden_labels_are_read_once_and_leave_the_generators_alone(make, key) -> None:
    dataset = Plain([0, 1, 1, 0, 2], make)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for _ in range(2):
        assert find_labels(dataset, key).tolist() == [0, 1, 1, 0, 2]
    assert dataset.reads == 5
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(0, 1)])


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (Stream(), TypeError, "IterableDataset, whose samples cannot be chosen"),
        (Kept("targets", [0, 1]), ValueError, "Kept has 1000 samples but 2 targets"),
        (Plain([0, 1], lambda x, y: x), ValueError, "No labels can be found in Plain: a sample is a Tensor"),
        (Plain([0, 1], lambda x, y: {"image": x, "z": y}), ValueError, "No labels can be found in Plain: Cannot tell"),
        (TensorDataset(torch.zeros(3)), ValueError, "inputs only"),
        ([0.5, 1.5], TypeError, "bin_targets"),
        (["cat", "dog"], TypeError, "labels of type str such as 'cat' are no class ids"),
        ([0, -1], ValueError, "negative class ids, -1"),
        ([[0, 2], [1, 0]], ValueError, "must be 0 or 1"),
        ([[0], [1, 0]], ValueError, "ragged"),
        (np.zeros((2, 2, 2), int), ValueError, "shape"),
        ([], ValueError, "no labels"),
        (np.array([1j, 2]), TypeError, "dtype complex128"),
        ([0, 1, 10**12], ValueError, "class id 1000000000000 is too high"),
        (object(), TypeError, "object is no dataset"),
    ],
)
def test_wrong_labels_say_what_to_do(labels, error, message) -> None:
    with pytest.raises(error, match=f"(?i){message}"):
        ImbalancedSampler(labels)


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


# ---- batches


@pytest.mark.parametrize("minimum", [1, 3, {3: 5, 2: 2}, [0, 0, 0, 8]], ids=str)
@pytest.mark.parametrize("strategy", NAMES, ids=str)
def test_every_batch_has_the_minimum(strategy, minimum) -> None:
    sampler = ImbalancedBatchSampler(LABELS, 16, minimum, strategy, num_samples=1000)
    wanted = {int: lambda m: [m] * 4, dict: lambda m: [m.get(c, 0) for c in range(4)], list: list}[type(minimum)](
        minimum
    )
    for epoch in range(3):
        sampler.set_epoch(epoch)
        drawn = np.array(list(sampler)).reshape(-1, 16)
        assert len(drawn) == 63
        of_batches = np.array([np.bincount(LABELS[batch], minlength=4) for batch in drawn])
        assert (of_batches >= wanted).all()
        assert (of_batches.max(0) - of_batches.min(0) <= 1).all()
        for label in range(4):
            seen = visits(sampler, drawn.ravel())[label == LABELS]
            assert seen.max() - seen.min() <= 1


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_batches(world) -> None:
    alone = ImbalancedBatchSampler(LABELS, 8, num_samples=8 * 16)
    batches = alone.indices(2).reshape(-1, 8)
    ranks = [ImbalancedBatchSampler(LABELS, 8, num_samples=8 * 16, num_replicas=world, rank=r) for r in range(world)]
    assert (np.stack([r.indices(2).reshape(-1, 8) for r in ranks], 1).reshape(-1, 8) == batches).all()
    uneven = [
        ImbalancedBatchSampler(LABELS, 8, num_samples=8 * 15, num_replicas=world, rank=r, drop_last=drop)
        for drop in (False, True)
        for r in range(world)
    ]
    assert len({len(list(rank)) for rank in uneven}) == 2
    assert [len(list(rank)) for rank in uneven] == [len(rank) for rank in uneven]


def test_batches_go_on_where_they_were() -> None:
    sampler = ImbalancedBatchSampler(LABELS, 8, num_samples=80)
    whole = sampler.indices(1).tolist()
    sampler.set_position(1, 24)
    assert list(sampler) == whole[24:]
    assert sampler.indices(1, 3, 21).tolist() == whole[3:21]
    with pytest.raises(ValueError, match="position=3 is in the middle of a batch"):
        sampler.set_position(1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_class_minimum": 5}, "need 20 samples, more than batch_size=16"),
        ({"per_class_minimum": -1}, "0 or more"),
        ({"per_class_minimum": {9: 1}}, r"names classes \[9\]"),
        ({"per_class_minimum": [1, 1]}, "one for each of 4 classes"),
        ({"per_class_minimum": [1, 1, 0, 1.5]}, "integer"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_wrong_minima_say_so(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ImbalancedBatchSampler(LABELS, **{"batch_size": 16} | arguments)


def test_batches_leave_out_what_the_mix_leaves_out_and_undersample_without_repeats() -> None:
    sampler = ImbalancedBatchSampler(LABELS, 8, 2, {0: 0, 1: 1, 2: 1, 3: 1}, num_samples=80)
    assert 0 not in LABELS[sampler.indices(0)]
    under = ImbalancedBatchSampler(LABELS, 16, 1, "undersample")
    assert len(under) == 16
    assert len(set(under)) == 16


# ---- Lightning on two ranks

SMALL = TensorDataset(torch.arange(100), torch.tensor([0] * 90 + [1] * 10))


class Watcher(LightningModule):
    """Remembers which samples it saw; of its own hook Lightning watches how loaders and batch samplers are made."""

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.layer, self.seen, self.loader = torch.nn.Linear(1, 1), [], loader

    def train_dataloader(self) -> Any:
        return self.loader()

    def training_step(self, batch: Any) -> Tensor:
        self.seen.append(batch[0].tolist())
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def what_a_rank_sees(folder: Path) -> dict[str, Any]:
    def train(loader: Any, hook: bool) -> Any:
        module = Watcher(loader)
        trainer, _ = build(folder=folder, module=module, devices=2, strategy="ddp", max_epochs=2)
        trainer.fit(module, train_dataloaders=None if hook else loader())
        return module.seen

    labels = SMALL.tensors[1]
    result = {}
    for hook in (True, False):
        result[f"batches {hook}"] = train(
            lambda: ImbalancedBatchSampler(labels, 8, {0: 2, 1: 3}, num_samples=64).loader(SMALL), hook
        )
    result["samples"] = train(lambda: DataLoader(SMALL, 8, sampler=ImbalancedSampler(SMALL, num_samples=64)), True)
    return result


def test_lightning_on_two_ranks_leaves_both_samplers_alone(tmp_path: Path) -> None:
    ranks = on_two_ranks(tmp_path, what_a_rank_sees)
    labels = np.repeat([0, 1], [90, 10])
    batches = ImbalancedBatchSampler(labels, 8, {0: 2, 1: 3}, num_samples=64)
    samples = ImbalancedSampler(labels, num_samples=64)
    for hook in (True, False):
        together = np.stack([rank[f"batches {hook}"] for rank in ranks], 1)
        assert together.reshape(2, 64).tolist() == [batches.indices(epoch).tolist() for epoch in (0, 1)]
    together = np.stack([np.reshape(rank["samples"], -1) for rank in ranks], 1)
    assert together.reshape(2, 64).tolist() == [samples.indices(epoch).tolist() for epoch in (0, 1)]


# ---- size and speed


def test_index_takes_four_bytes_a_sample_and_the_first_comes_at_once() -> None:
    labels = np.zeros(2_000_000, np.uint8)
    labels[::21] = 1
    sampler = ImbalancedSampler(labels, num_replicas=8, rank=7)
    assert sampler._pool.index.nbytes == 4 * len(labels)
    pool = build_pool(labels, 2)
    assert (pool.index[: pool.counts[0]] == np.flatnonzero(labels == 0)).all()
    assert (pool.index[pool.counts[0] :] == np.flatnonzero(labels)).all()
    start = time.process_time()
    next(iter(sampler))
    assert time.process_time() - start < 0.05


def test_benchmark_in_its_smallest_form(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "benchmarks/imbalance/draw.py"
    spec = importlib.util.spec_from_file_location("draw", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    result = benchmark.main(["--smoke", f"--out={tmp_path / 'draw.json'}"])
    assert json.loads((tmp_path / "draw.json").read_text()) == result
    for name in benchmark.DATA:
        assert result[f"1e5, {name}"]["index_bytes_a_sample"] == 4
        assert result[f"1e5, {name}"]["peak_beside_index_mb"] < 50
