"""Training data of their own for each member."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_tips import BatchAugmentationCallback, EnsembleModule, ImbalancedSamplerCallback
from lightning_tips.ensemble.data import MemberSampler, bootstrap, majority_subset

from harness import LoaderData, PlainData, PlainModule, assert_same, bits, every_step, fit


class Watching(PlainModule):
    """Remembers the sums of the images that it saw, which tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[float]] = []
        self.labels: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch[0].double().square().sum((1, 2, 3)).tolist())
        self.labels += batch[1].tolist()
        return super().training_step(batch, batch_idx)


def test_bootstrap_draws_as_many_with_replacement() -> None:
    drawn = [bootstrap(1000, 0, member) for member in range(3)]
    for one in drawn:
        assert len(one) == 1000
        assert 600 < len(np.unique(one)) < 665  # 1 - 1/e of them
    assert not (drawn[0] == drawn[1]).all()
    assert (bootstrap(1000, 0, 2) == drawn[2]).all()


def test_majority_subsets_keep_the_rare_class_and_deal_out_the_others() -> None:
    labels = np.repeat([0, 1, 2], [100, 10, 35])
    parts = [majority_subset(labels, 0, member) for member in range(10)]
    for part in parts:
        assert np.bincount(labels[part]).tolist() == [10, 10, 10]
        assert len(np.unique(part)) == 30
    assert len(np.unique(np.concatenate(parts))) == 145  # together they see all
    assert np.bincount(labels[majority_subset(labels, 0, 3, ratio=2)]).tolist() == [20, 10, 20]
    with pytest.raises(ValueError, match="at least 1"):
        majority_subset(labels, 0, 0, ratio=0.5)


def test_sampler_goes_on_where_it_is_told(monkeypatch) -> None:
    sampler = MemberSampler(np.arange(11), 0, 1)
    sampler.set_epoch(3)
    whole = list(sampler)
    assert sorted(whole) == list(range(11))
    sampler.set_position(3, 4)
    assert list(sampler) == whole[4:]
    assert list(sampler) == whole
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr("lightning_tips.core.epoch_sampler._world", lambda rank=rank: (2, rank))
        ranks.append(list(sampler))
    assert [index for pair in zip(*ranks, strict=True) for index in pair][:11] == whole
    assert [len(sampler), len(ranks[0]), len(ranks[1])] == [6, 6, 6]


@pytest.mark.parametrize("kind", ["own_order", "bootstrap", "majority_subsets"])
def test_each_member_sees_data_of_its_own(kind: Any, tmp_path: Path) -> None:
    ensemble = EnsembleModule(member=Watching, n=2, member_data=kind, seed=0)
    trainer = fit(ensemble, folder=tmp_path, max_epochs=2, data=LoaderData())
    first, second = ensemble.members
    assert first.seen != second.seen
    seen = [sorted(sum_ for batch in member.seen for sum_ in batch) for member in ensemble.members]
    if kind == "own_order":
        assert seen[0] == pytest.approx(seen[1])
        assert len(seen[0]) == 2 * len(LoaderData().train)
    if kind == "majority_subsets":
        counts = torch.tensor(first.labels).bincount()
        assert counts.min() == counts.max()
    assert trainer.global_step == len(first.seen)


def test_a_member_with_its_own_order_ends_as_alone_with_that_order(tmp_path: Path) -> None:
    ensemble = EnsembleModule(member=PlainModule, n=3, member_data="own_order", seed=7)
    member = EnsembleModule(member=PlainModule, n=3, seed=7).members[1]

    class Ordered(LoaderData):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.train, 32, sampler=MemberSampler(np.arange(len(self.train)), 7, 1))

    fit(ensemble, folder=tmp_path, max_epochs=3, data=LoaderData())
    fit(folder=tmp_path, max_epochs=3, module=member, data=Ordered())
    assert_same(dict(ensemble.members[1].state_dict()), dict(member.state_dict()))


def test_batches_of_a_plain_batch_sampler_keep_their_size(tmp_path: Path) -> None:
    class Batched(LoaderData):
        def train_dataloader(self) -> Any:
            batches = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(self.train), 100, True)
            return torch.utils.data.DataLoader(self.train, batch_sampler=batches)

    ensemble = EnsembleModule(member=Watching, n=2, member_data="own_order", seed=0)
    fit(ensemble, folder=tmp_path, max_epochs=1, data=Batched())
    assert [[len(batch) for batch in member.seen] for member in ensemble.members] == [[100] * 4] * 2


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_goes_on_with_the_batches_that_are_due(workers: int, tmp_path: Path) -> None:
    def make() -> EnsembleModule:
        return EnsembleModule(member=PlainModule, n=2, member_data="bootstrap", seed=0)

    def data() -> LoaderData:
        return LoaderData(batch_size=100, num_workers=workers)

    options: dict[str, Any] = {"folder": tmp_path, "max_epochs": 2, "limit_val_batches": 1}
    whole = fit(make(), every_step(tmp_path / "kept"), data=data(), **options)
    steps = whole.global_step // 2
    for step in (2, steps) if workers == 0 else (steps + 1,):
        checkpoint = tmp_path / "kept" / f"step-step={step}.ckpt"
        again = fit(make(), every_step(tmp_path / "kept"), data=data(), ckpt_path=checkpoint, **options)
        assert_same(bits(again), bits(whole), f"step {step}")


def test_each_member_has_its_own_augmentation(tmp_path: Path) -> None:
    augmentation = BatchAugmentationCallback("light", preview=False)
    ensemble = EnsembleModule(member=Watching, n=2, member_callbacks=[augmentation], seed=0)
    fit(ensemble, folder=tmp_path, max_epochs=1)
    first, second = ensemble.members
    assert first.seen[0] != second.seen[0]
    plain = EnsembleModule(member=Watching, n=2, seed=0)
    fit(plain, folder=tmp_path, max_epochs=1)
    assert plain.members[0].seen == plain.members[1].seen != first.seen


class Looks(Callback):
    """What a member's callback takes for the training loader."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.loader = trainer.train_dataloader


def test_tips_of_a_member_find_its_own_loader_and_say_whose_they_are(tmp_path: Path, capfd) -> None:
    callbacks = [BatchAugmentationCallback("light", preview=False, mixup=0.2), Looks()]
    ensemble = EnsembleModule(member=PlainModule, n=2, member_data="own_order", member_callbacks=callbacks, seed=0)
    fit(ensemble, folder=tmp_path, max_epochs=1, data=LoaderData())
    assert [member.loader.sampler.member for member in ensemble.members] == [0, 1]
    printed = capfd.readouterr().out
    assert "does not tell" not in printed
    assert printed.count("member_1 [augmentation]") == 1


def test_what_cannot_have_data_of_its_own_is_refused(tmp_path: Path) -> None:
    ensemble = EnsembleModule(member=PlainModule, n=2, member_data="own_order")
    with pytest.raises(MisconfigurationException, match="one training loader"):
        fit(ensemble, folder=tmp_path, data=PlainData())
    with pytest.raises(MisconfigurationException, match="batches of its own"):
        fit(ensemble, ImbalancedSamplerCallback(), folder=tmp_path, data=LoaderData())

    class Weighted(LoaderData):
        def train_dataloader(self) -> Any:
            sampler = torch.utils.data.WeightedRandomSampler(torch.ones(len(self.train)), 64)
            return torch.utils.data.DataLoader(self.train, 32, sampler=sampler)

    with pytest.raises(MisconfigurationException, match="WeightedRandomSampler"):
        fit(ensemble, folder=tmp_path, data=Weighted())
    with pytest.raises(MisconfigurationException, match="overfit_batches repeats the first batches"):
        fit(ensemble, folder=tmp_path, data=LoaderData(), overfit_batches=2)

    class Dropping(LoaderData):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.train, len(self.train), shuffle=True, drop_last=True)

    few = EnsembleModule(member=PlainModule, n=2, member_data="majority_subsets")
    with pytest.raises(MisconfigurationException, match="less than a batch"):
        fit(few, folder=tmp_path, data=Dropping())
