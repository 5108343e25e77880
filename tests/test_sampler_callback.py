"""Balanced training data in any run: wherever the loaders come from, and exact on resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_tips import ImbalancedSampler, ImbalancedSamplerCallback, ImbalancedSamplerMixin
from lightning_tips.core import resumable
from lightning_tips.imbalance import ImbalancedBatchSampler

from harness import LoaderData, PlainModule, bits, build, every_epoch, every_step, fit

LABELS = torch.tensor([0] * 40 + [1] * 12 + [2] * 4)
DATA = TensorDataset(torch.arange(len(LABELS)).float(), LABELS)  # an input is its own index


class Diary(PlainModule):
    """Writes down the samples of each training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 3)
        self.seen: list[Any] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs[:, None] / len(LABELS))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first = batch
        while not isinstance(first, list | tuple) or not isinstance(first[0], Tensor):
            first = next(iter(first.values())) if isinstance(first, dict) else first[0]
        self.seen.append(plain(batch))
        return nn.functional.cross_entropy(self(first[0].float()), first[1].long().clamp(max=2))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(batch[0]).mean())

    def val_dataloader(self) -> DataLoader:
        return DataLoader(DATA, 28)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def plain(batch: Any) -> Any:
    if batch is None:  # of a loader that is used up
        return None
    if isinstance(batch, Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    return [plain(part) for part in batch]


class Loaders(LightningDataModule):
    """Whatever `make` returns."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def train_dataloader(self) -> Any:
        return self.make()

    def val_dataloader(self) -> DataLoader:
        return DataLoader(DATA, 28)


def loader(workers: int = 0, **arguments: Any) -> DataLoader:
    more = {"multiprocessing_context": "fork"} if workers else {}
    return DataLoader(DATA, 8, shuffle=True, num_workers=workers, **more | arguments)


def classes_of(seen: list[Any]) -> list[int]:
    return torch.tensor([label for batch in seen for label in batch[1]]).bincount(minlength=3).tolist()


# ---- resume

FORMS = {
    "one": lambda: loader(),
    "workers": lambda: loader(2),
    "persistent": lambda: loader(2, persistent_workers=True),
    "dict": lambda: {"a": loader(), "b": DataLoader(Subset(DATA, list(range(30, 56))), 4)},
    "longest": lambda: CombinedLoader([loader(), DataLoader(Subset(DATA, list(range(36, 48))), 4)], "max_size"),
    "shortest": lambda: CombinedLoader([loader(), DataLoader(DATA, 16)], "min_size"),
    "own sampler": lambda: DataLoader(DATA, 8, sampler=ImbalancedSampler(LABELS, "sqrt")),
    "batches": lambda: ImbalancedBatchSampler(LABELS, 8, 2).loader(DATA),
    "drop last": lambda: loader(drop_last=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_batches_after_a_resume_are_those_of_the_uninterrupted_run(form, tmp_path: Path) -> None:
    data = Loaders(FORMS[form])
    whole = Diary()
    keep = [every_step(tmp_path / "step"), every_epoch(tmp_path / "epoch")]
    arguments = {"folder": tmp_path, "data": data, "max_epochs": 3}
    trainer = fit(ImbalancedSamplerCallback(), *keep, module=whole, **arguments)
    steps = trainer.global_step // 3
    chosen = {1, steps - 1, steps, steps + 1, 2 * steps, 2 * steps + 2}  # in an epoch, its last batch, its first
    checkpoints = [(path, int(path.stem.split("=")[-1])) for path in (tmp_path / "step").glob("*.ckpt")]
    checkpoints = [(path, step) for path, step in checkpoints if step in chosen]
    assert len(checkpoints) == len(chosen)
    checkpoints += [(tmp_path / "epoch" / f"epoch-epoch={e}.ckpt", (e + 1) * steps) for e in (0, 1)]
    for path, step in checkpoints if "workers" not in form else checkpoints[::2]:
        resumed = Diary()
        fit(ImbalancedSamplerCallback(), *keep, module=resumed, ckpt_path=path, **arguments)
        assert resumed.seen == whole.seen[step:], path.stem


@pytest.mark.parametrize("limits", [{"limit_train_batches": 5}, {"limit_train_batches": 0.5}, {"max_steps": 25}])
def test_resume_with_limits(limits, tmp_path: Path) -> None:
    data, whole, resumed = Loaders(loader), Diary(), Diary()
    arguments = {"folder": tmp_path, "data": data} | (
        {"max_epochs": -1} if "max_steps" in limits else {"max_epochs": 3}
    )
    keep = every_step(tmp_path / "kept")
    trainer = fit(ImbalancedSamplerCallback(), keep, module=whole, **arguments | limits)
    length = trainer.num_training_batches
    # Of each epoch after its first batch, in the middle, before its last and at its end.
    for step in (n for n in range(1, trainer.global_step) if n % length in (1, length // 2, length - 1, 0)):
        resumed = Diary()
        path = tmp_path / "kept" / f"step-step={step}.ckpt"
        fit(ImbalancedSamplerCallback(), keep, module=resumed, ckpt_path=path, **arguments | limits)
        assert resumed.seen == whole.seen[step:], step


def test_resume_at_the_end_of_an_epoch_when_steps_are_counted(tmp_path: Path) -> None:
    # Here Lightning restores the state of a loader that has given all that the limit lets it give.
    data, whole, resumed = Loaders(loader), Diary(), Diary()
    arguments = {"folder": tmp_path, "data": data, "max_epochs": -1, "max_steps": 15, "limit_train_batches": 5}
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    fit(ImbalancedSamplerCallback(), keep, module=whole, **arguments)
    fit(ImbalancedSamplerCallback(), keep, module=resumed, ckpt_path=tmp_path / "epoch=1.ckpt", **arguments)
    assert resumed.seen == whole.seen[10:]


def test_another_draw_after_a_resume_is_an_event(tmp_path: Path) -> None:
    arguments = {"folder": tmp_path, "data": Loaders(loader), "max_epochs": 2}
    keep = every_epoch(tmp_path / "kept")
    fit(ImbalancedSamplerCallback(), keep, module=Diary(), **arguments)
    tip = ImbalancedSamplerCallback("undersample")
    fit(tip, keep, module=Diary(), ckpt_path=tmp_path / "kept" / "epoch-epoch=0.ckpt", **arguments)
    assert [event.what for event in tip.events] == ["oversample", "other samples than before the resume"]


# ---- wherever the data comes from


class WithLoader(Diary):
    def train_dataloader(self) -> DataLoader:
        return loader()


def test_loaders_of_the_module_and_those_given_to_fit(tmp_path: Path) -> None:
    for module, given in ((WithLoader(), None), (Diary(), loader())):
        trainer, _ = build(ImbalancedSamplerCallback(), folder=tmp_path, module=module, max_epochs=1)
        trainer.fit(module, given)
        assert classes_of(module.seen) == [40, 40, 40]
        assert trainer.val_dataloaders.sampler.__class__.__name__ == "SequentialSampler"
    trainer, module = build(folder=tmp_path, module=WithLoader(), max_epochs=1)
    trainer.fit(module)
    assert classes_of(module.seen) == [40, 12, 4]


def test_data_is_left_alone_after_the_run(tmp_path: Path) -> None:
    data = Loaders(loader)
    trainer = fit(ImbalancedSamplerCallback(), folder=tmp_path, data=data, module=Diary(), max_epochs=1)
    assert not isinstance(data.train_dataloader().sampler, ImbalancedSampler)
    trainer.callbacks = []
    trainer.fit_loop.max_epochs = 2
    module = Diary()
    trainer.fit(module, datamodule=data)
    assert classes_of(module.seen) == [40, 12, 4]


def test_a_loader_with_the_sampler_comes_out_as_it_went_in(tmp_path: Path) -> None:
    given = DataLoader(DATA, 8, sampler=ImbalancedSampler(LABELS))
    before, order = dict(vars(given)), list(given.sampler)
    trainer, module = build(ImbalancedSamplerCallback(), folder=tmp_path, module=Diary(), max_epochs=2)
    trainer.fit(module, given)
    assert classes_of(module.seen) == [80, 80, 80]
    assert type(given) is DataLoader
    assert vars(given) == before
    assert list(given.sampler) == order


def test_loaders_that_are_reloaded(tmp_path: Path) -> None:
    module, tip = Diary(), ImbalancedSamplerCallback()
    arguments = {"data": Loaders(loader), "max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    fit(tip, folder=tmp_path, module=module, **arguments)
    assert classes_of(module.seen) == [120, 120, 120]
    assert len(tip.samplers) == 1
    assert module.seen[:15] != module.seen[15:30]


class Records(Dataset):
    """Samples as dicts."""

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"scan": float(i), "grade": int(LABELS[i])}


class Graded(Diary):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch["scan"], batch["grade"]], batch_idx)


def test_samples_that_are_dicts(tmp_path: Path) -> None:
    data, module = Loaders(lambda: DataLoader(Records(), 8)), Graded()
    with pytest.raises(MisconfigurationException, match="No labels can be found"):
        fit(ImbalancedSamplerCallback(), folder=tmp_path, module=Graded(), data=data)
    fit(ImbalancedSamplerCallback(target_key="grade"), folder=tmp_path, module=module, data=data, max_epochs=1)
    assert classes_of(module.seen) == [40, 40, 40]


def test_regression_by_bins(tmp_path: Path) -> None:
    targets = torch.cat([torch.rand(90), 10 + torch.rand(10)])
    parts = [TensorDataset(torch.arange(50.0), targets[:50]), TensorDataset(torch.arange(50.0), targets[50:])]
    data, module = Loaders(lambda: DataLoader(ConcatDataset(parts), 10)), Diary()
    with pytest.raises(MisconfigurationException, match="bin_targets"):
        fit(ImbalancedSamplerCallback(), folder=tmp_path, module=Diary(), data=data)
    fit(ImbalancedSamplerCallback(bins=[5.0]), folder=tmp_path, module=module, data=data, max_epochs=1)
    drawn = torch.tensor([target for batch in module.seen for target in batch[1]])
    assert int((drawn > 5).sum()) == int((drawn < 5).sum()) == 90


def test_minimum_of_each_class_in_each_batch(tmp_path: Path) -> None:
    module, tip = Diary(), ImbalancedSamplerCallback({0: 0.8, 1: 0.15, 2: 0.05}, per_class_minimum=1)
    fit(tip, folder=tmp_path, module=module, data=Loaders(loader), max_epochs=2)
    assert all(set(batch[1]) == {0, 1, 2} for batch in module.seen)


# ---- what the user sees


def test_counts_before_and_after_are_shown(tmp_path: Path, capsys) -> None:
    trainer = fit(ImbalancedSamplerCallback(), folder=tmp_path, data=Loaders(loader), module=Diary(), max_epochs=1)
    shown = capsys.readouterr().out
    assert "Class balance of the training data" in shown
    assert [cell.strip() for cell in next(row for row in shown.splitlines() if "7.14%" in row).split("│")[1:-1]] == [
        "2",
        "4",
        "7.14%",
        "40",
        "33.33%",
    ]
    assert (Path(trainer.default_root_dir) / "tips" / "class_balance.png").stat().st_size > 5000
    fit(ImbalancedSamplerCallback(show=False), folder=tmp_path, data=Loaders(loader), module=Diary(), max_epochs=1)
    assert "Class balance" not in capsys.readouterr().out


def test_prior_is_in_the_checkpoint(tmp_path: Path) -> None:
    tip = ImbalancedSamplerCallback("sqrt")
    fit(tip, every_epoch(tmp_path), folder=tmp_path, data=Loaders(loader), module=Diary(), max_epochs=1)
    state = torch.load(tmp_path / "epoch-epoch=0.ckpt", weights_only=True)["callbacks"][tip.state_key]
    root = torch.tensor([40.0, 12.0, 4.0]).sqrt()
    assert state["trained_prior"] == pytest.approx((root / root.sum()).tolist())
    assert state["counts"] == [40, 12, 4]


# ---- wrong input


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(DATA)


class Unlike:
    def __iter__(self) -> Any:
        return iter([[torch.zeros(8), torch.zeros(8).long()]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataLoader(Endless(), 8), "IterableDataset decides.*ClassWeightCallback"),
        (lambda: Unlike(), "return a torch.utils.data.DataLoader"),
        (lambda: DataLoader(TensorDataset(torch.zeros(8), torch.zeros(8).long()), 4), "one class"),
        (
            lambda: DataLoader(TensorDataset(torch.zeros(8), torch.tensor([0, 2] * 4)), 4),
            "without samples: 1 of 3",
        ),
        (lambda: DataLoader(TensorDataset(torch.zeros(8)), 4), "no labels"),
        (lambda: DataLoader(TensorDataset(torch.zeros(8), torch.rand(8)), 4), "floats"),
    ],
)
def test_data_that_cannot_be_balanced_is_refused_before_the_first_step(make, message, tmp_path: Path) -> None:
    trainer, module = build(ImbalancedSamplerCallback(), folder=tmp_path, module=Diary())
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module, datamodule=Loaders(make))
    assert trainer.global_step == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="Did you mean 'oversample'"):
        ImbalancedSamplerCallback("oversampel")
    with pytest.raises(ValueError, match="at least 1"):
        ImbalancedSamplerCallback(num_samples=0)


def test_overfit_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="overfit_batches"):
        fit(ImbalancedSamplerCallback(), folder=tmp_path, module=Diary(), data=Loaders(loader), overfit_batches=2)


def test_a_sampler_without_a_position_cannot_resume() -> None:
    with pytest.raises(TypeError, match="cannot begin in mid-epoch"):
        resumable(loader()).place(0, 1.0)


# ---- the mixin


class Mixed(ImbalancedSamplerMixin, LoaderData):
    def __init__(self, batch_size: int = 16, **sampling: Any) -> None:
        super().__init__(batch_size, **sampling)

    def train_dataloader(self) -> Any:
        return super().train_dataloader()


def test_mixin_takes_the_arguments_of_the_callback(tmp_path: Path) -> None:
    data = Mixed(8, sampling="undersample", sampling_seed=3, samples_per_epoch=60)
    trainer = fit(data, folder=tmp_path, max_epochs=1)
    (sampler,) = data.tips[0].samplers
    assert (sampler.strategy, sampler.seed, sampler.epoch_size) == ("undersample", 3, 60)
    assert trainer.train_dataloader.batch_size == 8
    again = fit(Mixed(8, sampling="undersample", sampling_seed=3, samples_per_epoch=60), folder=tmp_path, max_epochs=1)
    assert torch.equal(bits(trainer)["weights"]["head.bias"], bits(again)["weights"]["head.bias"])
