"""Sampling of imbalanced classes: exact, the same on any number of ranks, and a function of (seed, epoch, position)."""

import importlib.util
import itertools
import json
import pickle
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_tips.imbalance import ImbalancedSampler
from lightning_tips.imbalance.draw import EpochOrder, build_pool, epoch_quotas, permute

from sampled import LABELS, NAMES, labels_of, visits

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")  # Python >= 3.12


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
