"""Corners of tip 3: chains of resumes, loaders of every make, odd targets, callbacks in every order."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_class_report import Clouds, Linear, balanced
from test_sampler_callback import DATA, Diary, Loaders, classes_of, loader
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from lightning_tips import ClassReportCallback, ImbalancedSamplerCallback

from harness import build, every_step, fit


class ListDataset(Dataset):
    def __init__(self, samples: list) -> None:
        self.kept = samples

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> tuple:
        return self.kept[index]


class AsksForSteps(Diary):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches == 45  # makes the loaders before the loops are restored
        return super().configure_optimizers()


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_resume_where_the_loaders_are_made_early(tmp_path: Path) -> None:
    arguments = {"folder": tmp_path, "data": Loaders(loader), "max_epochs": 3}
    whole = AsksForSteps()
    fit(ImbalancedSamplerCallback(), every_step(tmp_path / "kept"), module=whole, **arguments)
    for step in (7, 15, 20):
        resumed = AsksForSteps()
        path = tmp_path / "kept" / f"step-step={step}.ckpt"
        fit(ImbalancedSamplerCallback(), module=resumed, ckpt_path=path, **arguments)
        assert resumed.seen == whole.seen[step:], step


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Be aware that when using")
def test_second_resume_after_one_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    data = Loaders(lambda: [loader(), DataLoader(Subset(DATA, list(range(30, 56))), 4)])
    arguments = {"folder": tmp_path, "data": data, "max_epochs": 3}
    whole = Diary()
    fit(ImbalancedSamplerCallback(), every_step(tmp_path / "a"), module=whole, **arguments)
    path = tmp_path / "a" / "step-step=15.ckpt"
    fit(ImbalancedSamplerCallback(), every_step(tmp_path / "b"), module=Diary(), ckpt_path=path, **arguments)
    for step in (17, 30, 31):
        resumed = Diary()
        path = tmp_path / "b" / f"step-step={step}.ckpt"
        fit(ImbalancedSamplerCallback(), module=resumed, ckpt_path=path, **arguments)
        assert resumed.seen == whole.seen[step:], step


def test_combined_loader_of_the_user_stays_as_it_is(tmp_path: Path) -> None:
    given = CombinedLoader([loader()], "max_size_cycle")
    for tips, expected in (([ImbalancedSamplerCallback()], 120), ([], 56)):
        trainer, module = build(*tips, folder=tmp_path, module=Diary(), max_epochs=1)
        trainer.fit(module, given)
        assert sum(classes_of([batch[0] for batch in module.seen])) == expected


def test_batch_samplers_are_refused(tmp_path: Path) -> None:
    data = Loaders(lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 8, False)))
    with pytest.raises(MisconfigurationException, match="made with batch_sampler"):
        fit(ImbalancedSamplerCallback(), folder=tmp_path, module=Diary(), data=data)


def test_labels_that_are_corrected_between_two_fits_are_read_again(tmp_path: Path) -> None:
    data = [DATA[i] for i in range(len(DATA))]  # keeps no list of labels
    hidden = ListDataset(data)
    for moved in (0, 5):
        data[17 : 17 + moved] = [(number, torch.tensor(2)) for number, _ in data[17 : 17 + moved]]
        tip = ImbalancedSamplerCallback()
        fit(tip, folder=tmp_path, data=Loaders(lambda: DataLoader(hidden, 8)), module=Diary(), max_epochs=1)
        assert tip.class_counts is not None
        assert tip.class_counts.tolist() == [40 - moved, 12, 4 + moved]


def test_ignored_targets_change_nothing(tmp_path: Path) -> None:
    found = []
    for ignored in (0, 100):
        torch.manual_seed(0)
        data, module = Clouds(), Linear()
        points, labels = data.sets[1].tensors
        extra = torch.full((ignored,), -100)
        data.sets[1] = TensorDataset(torch.cat([points[:ignored], points]), torch.cat([extra, labels]))
        trainer = balanced(ImbalancedSamplerCallback(), folder=tmp_path, data=data, module=module, max_epochs=1)
        found.append(next(c for c in trainer.callbacks if isinstance(c, ClassReportCallback)).correction)
    assert found[0] == found[1]


def test_class_that_is_left_out_does_not_stop_the_run(tmp_path: Path) -> None:
    tips = ImbalancedSamplerCallback([0.5, 0.5, 0.0]), ClassReportCallback()
    with pytest.warns(UserWarning, match="cannot correct"):
        fit(*tips, folder=tmp_path, data=Loaders(loader), module=Diary(), max_epochs=1)


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
def test_what_cannot_be_reported_or_corrected_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="this run has none"):
        balanced(folder=tmp_path, limit_val_batches=0, max_epochs=1)

    class Around(Linear):
        def predict_step(self, batch, batch_idx):
            return self.layer(batch[0])

    trainer = balanced(ImbalancedSamplerCallback(), folder=tmp_path, module=Around(), max_epochs=1)
    data = DataLoader(Clouds().sets[1], batch_size=100)
    with pytest.warns(UserWarning, match="predict_step of Around does not call self"):
        trainer.predict(trainer.lightning_module, data)
