"""Runs on a part of the training data: which samples, in which order, beside what."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from lightning_tips import ImbalancedSamplerCallback, SubsetCallback, SubsetMixin
from lightning_tips.core import EpochSampler
from lightning_tips.data import nested_subset
from lightning_tips.vision import DigitsDataModule, ImageClassifier

from harness import LoaderData, PlainModule, assert_same, bits, every_step, fit

LABELS = np.random.default_rng(0).choice(10, 2000, p=[0.5, 0.3] + [0.025] * 8)


def test_greater_subsets_contain_smaller_ones_and_keep_the_shares_of_the_classes() -> None:
    before: set[int] = set()
    for size in (10, 11, 50, 137, 1000, 2000):
        chosen = nested_subset(LABELS, size, seed=3)
        assert len(chosen) == size == len(set(chosen.tolist()))
        assert (np.diff(chosen) > 0).all()
        assert before <= set(chosen.tolist())
        before = set(chosen.tolist())
        counts = np.bincount(LABELS[chosen], minlength=10)
        assert counts.min() >= 1
        if size >= 137:
            assert abs(counts / size - np.bincount(LABELS) / 2000).max() < 0.02
    assert nested_subset(LABELS, 50, 3).tolist() == nested_subset(torch.tensor(LABELS), 50, 3).tolist()
    assert nested_subset(LABELS, 50, 3).tolist() != nested_subset(LABELS, 50, 4).tolist()
    assert nested_subset(LABELS, 0.025, 3).tolist() == nested_subset(LABELS, 50, 3).tolist()
    assert set(nested_subset(2000, 20)) <= set(nested_subset(2000, 0.5))
    assert len({nested_subset(2000, 10, s)[0] for s in range(20)}) > 5  # not always the first ones
    several = np.eye(3, dtype=int)[LABELS[:600] % 3]
    several[:30, 2] = 1
    assert several[nested_subset(several, 9)].any(0).all()


@pytest.mark.parametrize(
    ("labels", "size", "seed", "says"),
    [
        (LABELS, 9, 0, "cannot hold each of 10 classes: take 10 or more"),
        (LABELS, 2001, 0, "only 2000 training samples"),
        (LABELS, 0, 0, "at least 1"),
        (LABELS, 50.0, 0, "as an integer"),
        (LABELS, True, 0, "must be a number"),
        (LABELS, 50, -1, "seed=-1"),
        (0, 5, 0, "nothing to choose"),
    ],
)
def test_what_cannot_be_chosen(labels, size, seed, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        nested_subset(labels, size, seed)


def test_an_epoch_has_every_sample_once_over_all_ranks_and_can_begin_anywhere() -> None:
    ranks = [EpochSampler(10, seed=1, num_replicas=3, rank=rank) for rank in range(3)]
    drawn = [list(sampler) for sampler in ranks]
    assert sorted({i for part in drawn for i in part}) == list(range(10))
    assert [len(part) for part in drawn] == [4, 4, 4]
    ranks[0].set_position(0, 3)
    assert list(ranks[0]) == drawn[0][3:]
    assert list(ranks[0]) == drawn[0]
    ranks[0].set_epoch(1)
    assert list(ranks[0]) != drawn[0]
    assert list(EpochSampler(4, shuffle=False)) == [0, 1, 2, 3]


class Sees(PlainModule):
    """Notes what it trains and validates on."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[torch.Tensor] = []
        self.validated = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trained.append(batch[0].flatten(1))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += len(batch[1])
        super().validation_step(batch, batch_idx)


def test_trains_on_the_part_alone_and_validates_on_all(tmp_path: Path) -> None:
    data, module = LoaderData(), Sees()
    labels = data.train.tensors[1]
    trainer = fit(SubsetCallback(100, seed=1), folder=tmp_path, module=module, data=data, max_epochs=1)
    chosen = data.train.tensors[0][nested_subset(labels, 100, 1)].flatten(1)
    seen = torch.cat(module.trained)
    assert torch.equal(seen.unique(dim=0), chosen.unique(dim=0))
    assert len(seen) == 100
    assert module.validated == 64 + 128  # the sanity check has one batch
    assert [str(e).partition(": ")[2] for e in trainer.callbacks[0].events] == [
        "a part of the data, stratified by class (samples 100, of 475)"
    ]
    # The data of the user is as it was.
    assert len(data.train_dataloader().dataset) == 475


@pytest.mark.parametrize("swap", [False, True])
def test_a_sampler_balances_within_the_part(swap: bool, tmp_path: Path) -> None:
    tips = [SubsetCallback(100), ImbalancedSamplerCallback("oversample", show=False)]
    module = Sees()
    data = LoaderData()
    fit(*(reversed(tips) if swap else tips), folder=tmp_path, module=module, data=data, max_epochs=1)
    images, labels = data.train.tensors
    part = nested_subset(labels, 100, 0)
    seen = torch.cat(module.trained)
    where = (seen[:, None] == images[part].flatten(1)[None]).all(2)
    assert where.any(1).all()
    drawn = labels[part][where.float().argmax(1)].bincount()
    assert drawn.max() - drawn.min() <= 1
    assert tips[1].class_counts.sum() == 100


def test_resumes_in_mid_epoch_with_workers_to_the_same_bits(tmp_path: Path) -> None:
    def run(**arguments: Any) -> Any:
        data = LoaderData(num_workers=1)
        return fit(SubsetCallback(100), every_step(tmp_path / "kept"), folder=tmp_path, data=data, **arguments)

    expected = bits(run(max_epochs=2))
    for step in (2, 4):
        assert_same(bits(run(max_epochs=2, ckpt_path=tmp_path / "kept" / f"step-step={step}.ckpt")), expected)


def test_another_part_after_a_resume_is_told_of(tmp_path: Path) -> None:
    fit(SubsetCallback(100), every_step(tmp_path / "kept"), folder=tmp_path, data=LoaderData(), max_epochs=1)
    tip = SubsetCallback(200)
    checkpoint = tmp_path / "kept" / "step-step=4.ckpt"
    keep = every_step(tmp_path / "kept")
    fit(tip, keep, folder=tmp_path, data=LoaderData(), max_epochs=2, ckpt_path=checkpoint)
    assert [event.what for event in tip.events][-1] == "other samples than before the resume"


class Dicts(Dataset):
    """Samples that are dicts, of a user who keeps no list of labels."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels_ = labels

    def __len__(self) -> int:
        return len(self.labels_)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.full((1, 8, 8), float(index)), "grade": self.labels_[index]}


class DictModule(PlainModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen = [*getattr(self, "seen", []), *batch["image"][:, 0, 0, 0].int().tolist()]
        targets = batch["grade"]
        return super().training_step((batch["image"], targets.long()), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 1.0)


def trained_on(tip: SubsetCallback, loader: Any, folder: Path) -> list[int]:
    module = DictModule()
    data = LoaderData()
    data.train_dataloader = lambda: loader
    fit(tip, folder=folder, module=module, data=data, max_epochs=1)
    return sorted(module.seen)


def test_dicts_and_numbers_to_be_predicted(tmp_path: Path) -> None:
    tip = SubsetCallback(20, target_key="grade")
    labels = np.arange(100) % 4
    assert trained_on(tip, DataLoader(Dicts(labels), 8), tmp_path) == nested_subset(labels, 20).tolist()
    values = np.linspace(0, 3, 100)
    tip = SubsetCallback(0.2, target_key="grade")
    chosen = trained_on(tip, DataLoader(Dicts(values), 8, shuffle=True), tmp_path)
    assert [sum(10 * b <= i < 10 * b + 10 for i in chosen) for b in range(10)] == [2] * 10
    assert "10 bins of the targets" in tip.events[0].what
    with pytest.raises(MisconfigurationException, match="No labels can be found"):
        trained_on(SubsetCallback(20), DataLoader(Dicts(labels), 8), tmp_path)
    any_ = SubsetCallback(20, stratify=False)
    assert trained_on(any_, DataLoader(Dicts(labels), 8), tmp_path) == nested_subset(100, 20).tolist()


def test_last_batches(tmp_path: Path) -> None:
    """drop_last would leave no batch at all; and a batch of one would stop BatchNorm."""
    labels = np.arange(100) % 4
    loader = DataLoader(Dicts(labels), 64, shuffle=True, drop_last=True)
    assert len(trained_on(SubsetCallback(20, target_key="grade"), loader, tmp_path)) == 20
    assert len(trained_on(SubsetCallback(17, target_key="grade"), DataLoader(Dicts(labels), 8), tmp_path)) == 16


@pytest.mark.parametrize("made_in_hook", [True, False])
def test_batches_of_a_plain_batch_sampler_keep_their_size(made_in_hook: bool, tmp_path: Path) -> None:
    def make(sampler: type[Sampler]) -> DataLoader:
        data = TensorDataset(torch.randn(20, 1, 8, 8), torch.arange(20) % 2)
        return DataLoader(data, batch_sampler=BatchSampler(sampler(data), 3, True))

    for sampler in (RandomSampler, SequentialSampler):
        module, data, loader = Sees(), LoaderData(), make(sampler)
        data.train_dataloader = (lambda kind=sampler: make(kind)) if made_in_hook else (lambda given=loader: given)
        trainer = fit(SubsetCallback(10), folder=tmp_path, module=module, data=data, max_epochs=1)
        assert [len(batch) for batch in module.trained] == [3, 3, 3]
        assert trainer.train_dataloader.sampler.shuffle == (sampler is RandomSampler)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(8))


@pytest.mark.parametrize(
    ("tip", "loader", "says"),
    [
        (SubsetCallback(5), DataLoader(TensorDataset(torch.zeros(20, 1), torch.arange(20) % 10)), "each of 10 classes"),
        (SubsetCallback(50), DataLoader(TensorDataset(torch.zeros(20, 1), torch.arange(20) % 10)), "only 20 training"),
        (SubsetCallback(5), DataLoader(Stream()), "IterableDataset decides"),
        (
            SubsetCallback(5),
            DataLoader(range(20), sampler=WeightedRandomSampler([1.0] * 20, 20)),
            "WeightedRandomSampler, which knows the whole dataset only.*ImbalancedSamplerCallback",
        ),
        (
            SubsetCallback(5),
            DataLoader(range(20), batch_sampler=BatchSampler(WeightedRandomSampler([1.0] * 20, 20), 4, False)),
            "WeightedRandomSampler, which knows the whole dataset only",
        ),
        (SubsetCallback(5), DataLoader(range(20), batch_sampler=[[0, 1], [2, 3]]), "by list, which knows"),
        (SubsetCallback(5), DataLoader(TensorDataset(torch.zeros(20, 1), torch.rand(20, 3))), "3,\\) numbers"),
    ],
)
def test_refuses_before_the_first_step(tip, loader, says: str, tmp_path: Path) -> None:
    with pytest.raises((MisconfigurationException, RuntimeError, ValueError), match=says):
        trained_on(tip, loader, tmp_path)


def test_overfit_batches_and_a_second_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="overfit_batches"):
        fit(SubsetCallback(50), folder=tmp_path, data=LoaderData(), overfit_batches=1)

    class Data(SubsetMixin, LoaderData):
        pass

    with pytest.raises(MisconfigurationException, match="There are 2 SubsetCallback"):
        fit(SubsetCallback(50), folder=tmp_path, data=Data(subset_size=60))
    assert not Data().tips  # by default all of the data
    for arguments in ({"size": 0}, {"size": 2.0}, {"size": 5, "seed": -1}):
        with pytest.raises(ValueError, match="must"):
            SubsetCallback(**arguments)


def test_reference_data_module_keeps_its_batches(tmp_path: Path) -> None:
    """A sampler of its own, a collate function of its own, batches that are fetched at once."""
    data = DigitsDataModule(batch_size=64)
    trainer = fit(SubsetCallback(0.2), folder=tmp_path, module=ImageClassifier(in_channels=1), data=data, max_epochs=1)
    assert trainer.global_step == 5
    assert len(trainer.train_dataloader.dataset) == 259


def test_a_split_of_a_split(tmp_path: Path) -> None:
    images = torch.arange(60.0)[:, None, None, None].expand(60, 1, 8, 8)
    half, _ = random_split(TensorDataset(images, torch.arange(60) % 3), [0.5, 0.5], torch.Generator().manual_seed(0))

    class Data(SubsetMixin, LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(half, 4, shuffle=True)

        def val_dataloader(self) -> Any:
            return LoaderData().val_dataloader()

    module = Sees()
    fit(folder=tmp_path, module=module, data=Data(subset_size=12, subset_seed=2), max_epochs=1)
    seen = sorted(int(row[0]) for row in torch.cat(module.trained))
    labels = np.array([half[i][1] for i in range(30)])
    assert seen == sorted(int(half[i][0][0, 0, 0]) for i in nested_subset(labels, 12, 2))
