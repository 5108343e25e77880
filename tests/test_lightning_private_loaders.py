"""Private attributes of Lightning still are what they are taken for: those that have to do with loaders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from lightning_tips.core.lightning_private import (
    IndexSource,
    batch_on_device,
    change_train_loaders,
    epoch_of_samplers,
    forget_train_loaders,
    load_validation,
    reads_index_source,
    restore_loader_classes,
    with_dataset,
    with_sampler,
)

from harness import STEPS_A_EPOCH, PlainData, PlainModule, build, fit


class OwnLoader(DataLoader):
    """A subclass with an argument of its own."""

    def __init__(self, dataset: Any, colour: str, **arguments: Any) -> None:
        super().__init__(dataset, **arguments)
        self.colour = colour


def test_train_loaders_pass_through_a_change_and_no_more_after_it_was_taken_back(tmp_path: Path) -> None:
    seen: list[str] = []
    change = {"undo": lambda: None}

    class Changes(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            change["undo"] = change_train_loaders(
                trainer, lambda loaders: seen.append(type(loaders).__name__) or loaders
            )

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            change["undo"]()

    trainer = fit(Changes(), folder=tmp_path, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    assert trainer.global_step == 2 * STEPS_A_EPOCH
    assert seen == ["ResumableLoader"]


def test_changes_of_loaders_are_taken_back_in_any_order(tmp_path: Path) -> None:
    """Tips are torn down in the order in which they were set up, not the other way round."""
    seen: list[str] = []
    trainer, _ = build(folder=tmp_path)
    source = trainer.fit_loop._data_source
    source.instance = [0]
    undo = [change_train_loaders(trainer, lambda loaders, n=name: seen.append(n) or [*loaders, n]) for name in "ab"]
    assert source.dataloader() == [0, "a", "b"]
    undo[0]()
    assert source.dataloader() == [0, "b"]
    undo[0]()  # once more does nothing
    undo[1]()
    assert source.dataloader() == [0]
    assert seen == ["a", "b", "b"]
    change_train_loaders(trainer, lambda loaders: [*loaders, "second"])
    change_train_loaders(trainer, lambda loaders: [*loaders, "first"], first=True)
    assert source.dataloader() == [0, "first", "second"]


class OwnDataLoader(DataLoader):
    def __init__(self, images: Any, labels: Any) -> None:
        super().__init__(list(zip(images, labels, strict=True)))


def test_a_loader_is_made_anew_with_other_data_and_all_else_as_it_was() -> None:
    def collate(samples: list[int]) -> int:
        return sum(samples)

    loader = OwnLoader(range(8), "red", batch_size=2, collate_fn=collate, drop_last=True)
    part = with_dataset(loader, range(10, 15), SequentialSampler(range(5)))
    assert type(part) is OwnLoader
    assert part.colour == "red"
    assert list(part) == [21, 25]
    assert list(with_dataset(loader, range(10, 15), SequentialSampler(range(5)), drop_last=False)) == [21, 25, 14]
    assert len(loader.dataset) == 8
    with pytest.raises(MisconfigurationException, match="OwnDataLoader"):
        with_dataset(OwnDataLoader([1], [2]), range(3), SequentialSampler(range(3)))


@pytest.mark.parametrize("workers", [0, 1])
def test_torch_loaders_draw_from_the_index_source(workers: int) -> None:
    class Halves(IndexSource):
        def index_source(self, source: Any) -> Any:
            return [batch[:1] for batch in source]

    loader = Halves(range(8), batch_size=2, num_workers=workers, persistent_workers=bool(workers))
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == [[0], [2], [4], [6]]
    assert len(loader) == 4
    assert reads_index_source(DataLoader)
    assert reads_index_source(OwnLoader)
    assert not reads_index_source(type("Own", (DataLoader,), {"__iter__": lambda self: iter([])}))


def test_an_error_while_loaders_are_changed_leaves_their_classes_as_they_were(tmp_path: Path) -> None:
    before = [dict(vars(kind)) for kind in (DataLoader, OwnLoader, BatchSampler)]

    class Fails(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            def change(loaders: Any) -> Any:
                raise ValueError("no labels")

            change_train_loaders(trainer, change)

    for _ in range(2):
        with pytest.raises(ValueError, match="no labels"):
            fit(Fails(), folder=tmp_path)
    for kind, own in zip((DataLoader, OwnLoader, BatchSampler), before, strict=True):
        assert vars(kind).get("__init__") is own.get("__init__")
        assert not [name for name in vars(kind) if name.startswith("__old")]
    trainer, _ = build(folder=tmp_path)
    trainer.predict(Predicts(), DataLoader(torch.rand(6, 1, 8, 8), 2))  # Lightning fails here with a patched class


def test_loaders_that_are_made_too_early_are_made_anew(tmp_path: Path) -> None:
    made: list[str] = []

    class Reads(PlainModule):
        def configure_optimizers(self) -> Any:
            assert self.trainer.estimated_stepping_batches == STEPS_A_EPOCH
            return super().configure_optimizers()

    class Counts(PlainData):
        def train_dataloader(self) -> Any:
            made.append("loader")
            return super().train_dataloader()

    class Forgets(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            forget_train_loaders(trainer)

    fit(folder=tmp_path, module=Reads(), data=Counts(), max_epochs=1)
    assert len(made) == 1
    trainer = fit(Forgets(), folder=tmp_path, module=Reads(), data=Counts(), max_epochs=1)
    assert len(made) == 3
    assert trainer.global_step == STEPS_A_EPOCH


def test_classes_that_lightning_did_not_replace_are_left_alone() -> None:
    before = dict(vars(DataLoader))
    restore_loader_classes()
    assert dict(vars(DataLoader)) == before


class Predicts(PlainModule):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch)


def test_loader_keeps_its_class_and_arguments_with_another_sampler(tmp_path: Path) -> None:
    loaders: list[DataLoader] = []

    class Own(PlainData):
        def train_dataloader(self) -> DataLoader:
            return OwnLoader(super().train_dataloader().dataset, colour="red", batch_size=32, drop_last=True)

    class Changes(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            def change(loader: Any) -> Any:
                loaders.append(with_sampler(loader, SequentialSampler(range(64))))
                return loaders[-1]

            change_train_loaders(trainer, change)

    trainer = fit(Changes(), folder=tmp_path, data=Own(), max_epochs=1)
    (loader,) = loaders
    assert (type(loader), loader.colour, loader.batch_size, loader.drop_last) == (OwnLoader, "red", 32, True)
    assert trainer.global_step == 2


def test_epoch_of_samplers_is_the_one_that_lightning_sets(tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []

    class Listens(DistributedSampler):
        def set_epoch(self, epoch: int) -> None:
            said.append((epoch, epoch_of_samplers(run[0])))

    class Own(PlainData):
        def train_dataloader(self) -> DataLoader:
            dataset = super().train_dataloader().dataset
            return DataLoader(dataset, 32, sampler=Listens(dataset, num_replicas=1, rank=0))

    run = build(folder=tmp_path, max_epochs=3)
    run[0].fit(run[1], datamodule=Own())
    assert said == [(0, 0), (1, 1), (2, 2)]


class AsksForBatches(Callback):
    """Compares a batch that it brings to the device with the one that the step gets."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            raw = next(iter(trainer.datamodule.train_dataloader()))  # type: ignore[attr-defined]
            assert torch.equal(batch_on_device(trainer, raw)[0], raw[0] + 1 + 2)
            assert trainer.val_dataloaders is None
            load_validation(trainer)
            assert trainer.training
            assert trainer.val_dataloaders is not None
            self.asked = True


def test_batches_pass_through_the_hooks_and_validation_can_be_loaded_early(tmp_path: Path) -> None:
    class Hooked(PlainData):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 1, batch[1]]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 2, batch[1]]

    asks = AsksForBatches()
    arguments = {"max_epochs": 1, "check_val_every_n_epoch": 100, "num_sanity_val_steps": 0}
    fit(asks, folder=tmp_path, data=Hooked(), **arguments)
    assert asks.asked
