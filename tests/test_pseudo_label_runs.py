"""`PseudoLabelCallback` in runs: what batches hold, that it leaves no trace, resumed, refused, from a yaml."""

import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tips.data import PseudoLabelCallback, choose_pseudo_labels

from harness import LoaderData, PlainModule, assert_same, bits, build, every_epoch, fit
from settings import SETTINGS

QUIET: dict[str, Any] = {"epoch_size": 128, "max_drop": None, "threshold": 0.0, "top_share": 0.5, "align": True}


class Teacher(nn.Module):
    """Knows the digits by heart."""

    def __init__(self) -> None:
        super().__init__()
        data = LoaderData()
        self.images, self.labels = data.images.flatten(1), data.labels

    def forward(self, images: Tensor) -> Tensor:
        nearest = torch.cdist(images.flatten(1).cpu(), self.images).argmin(1)
        return torch.nn.functional.one_hot(self.labels[nearest], 10).float()


class Recording(PlainModule):
    """Writes down what it is trained on, and whether the pseudo-labelled are there with the right labels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        known = {image.numpy().tobytes(): int(label) for image, label in zip(*self.secret, strict=True)}
        hits = [(known.get(i.numpy().tobytes()), int(y)) for i, y in zip(images, labels, strict=True)]
        mixed = [(true, given) for true, given in hits if true is not None]
        self.seen.append((len(mixed), sum(true == given for true, given in mixed)))
        return super().training_step(batch, batch_idx)


class HiddenLabels(LoaderData):
    """The unlabelled samples lie about their labels."""

    def unlabelled_dataset(self) -> Any:
        whole = super().unlabelled_dataset()
        return TensorDataset(whole.tensors[0], (whole.tensors[1] + 1) % 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_their_share_with_the_teachers_labels(workers: int, tmp_path: Path) -> None:
    tip = PseudoLabelCallback(
        teacher=Teacher(), start_epoch=1, every_n_epochs=2, share=0.1, max_drop=None, epoch_size=128, threshold=0.99
    )
    data = HiddenLabels(num_workers=workers)
    original = data.train_dataloader

    def persistent() -> DataLoader:
        loader = original()
        return DataLoader(
            loader.dataset, loader.batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )

    data.train_dataloader = persistent  # type: ignore[method-assign]
    module = Recording()
    whole = LoaderData().unlabelled_dataset()
    module.secret = whole.tensors
    warnings.filterwarnings("ignore", ".*tells nothing")
    fit(tip, folder=tmp_path, module=module, data=data, max_epochs=3)
    assert [mixed for mixed, _ in module.seen[:4]] == [0] * 4
    assert sum(mixed for mixed, _ in module.seen[4:]) == 2 * int(128 * tip.sampler.share)
    assert all(mixed == right for mixed, right in module.seen)  # what the set said of itself was never used
    assert tip.sampler.share == pytest.approx(0.1)
    again = pickle.loads(pickle.dumps(tip))
    assert again.state_dict()["unlabelled"] == len(whole)
    assert again.describe() == tip.describe()


def test_labelling_leaves_no_trace_on_the_run(tmp_path: Path) -> None:
    class Counting(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1  # even that
            if not self.training:
                torch.rand(1), random.random(), np.random.rand()
            return super().forward(images)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 0 * torch.rand(())

    def run(name: str, **changes: Any) -> Any:
        tip = PseudoLabelCallback(**(QUIET | {"start_epoch": 0, "every_n_epochs": 1} | changes))
        trainer, _ = build(tip, folder=tmp_path / name, module=Counting(), max_epochs=2)
        trainer.fit(trainer.lightning_module or Counting(), datamodule=LoaderData())
        return trainer, tip

    torch.manual_seed(0)
    none, _ = run("none", start_epoch=100)
    # Labels are made in each epoch, but of none is anything used.
    torch.manual_seed(0)
    import lightning_tips.data.pseudo_callback as room

    real = room.natural_share
    room.natural_share = lambda *_: 0.0
    try:
        labelled, tip = run("labelled")
    finally:
        room.natural_share = real
    assert len(tip.events) == 2
    first, second = bits(none), bits(labelled)
    first.pop("events"), second.pop("events")
    assert_same(first, second)


def test_guard_gives_up_and_says_so(tmp_path: Path) -> None:
    class Liar(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(torch.arange(len(images)) % 10, 10).float()

    tip = PseudoLabelCallback(
        teacher=Liar(), start_epoch=1, every_n_epochs=5, max_drop=0.0, reference=2.0, patience=2, epoch_size=128
    )
    warnings.filterwarnings("ignore", ".*tells nothing")
    fit(tip, folder=tmp_path, module=PlainModule(), data=LoaderData(), max_epochs=5)
    assert [(event.epoch, event.what) for event in tip.events] == [
        (1, "pseudo-labels, round 1"),
        (3, "pseudo-labels hurt: given up"),
    ]
    assert tip.events[1].details["supervised"] == 2.0
    assert tip.sampler.share == 0
    assert tip.pseudo_labels is None


def test_teachers_of_other_moments(tmp_path: Path) -> None:
    keep = every_epoch(tmp_path / "kept")
    fit(keep, folder=tmp_path, data=LoaderData(), max_epochs=2)
    paths = sorted(map(str, (tmp_path / "kept").glob("*.ckpt")))
    module = PlainModule()
    tip = PseudoLabelCallback(teacher=paths, start_epoch=0, every_n_epochs=9, audit=True, **QUIET)
    fit(tip, folder=tmp_path, module=module, data=LoaderData(), max_epochs=1)
    members = []
    for path in paths:
        member = PlainModule()
        member.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        with torch.no_grad():
            members.append(member.eval()(LoaderData().unlabelled_dataset().tensors[0]).softmax(1))
    prior = np.bincount(LoaderData().train.tensors[1])
    expected = choose_pseudo_labels(sum(members) / 2, 0.0, 0.5, None, prior, True)
    assert torch.equal(tip.pseudo_labels.labels, expected.labels)
    assert torch.equal(tip.pseudo_labels.indices, expected.indices)
    right = (LoaderData().unlabelled_dataset().tensors[1][expected.indices] == expected.labels).float().mean()
    assert tip.events[0].details["right"] == pytest.approx(float(right))
    assert tip.events[0].details["teacher"] == "2 checkpoints"
    assert list(tmp_path.rglob("pseudo_labels.csv"))
    assert list(tmp_path.rglob("pseudo_labels.png"))


class NothingNew(LoaderData):
    def unlabelled_dataset(self) -> Any:
        return TensorDataset(self.images[:0])


class SeveralLabels(LoaderData):
    def __init__(self) -> None:
        super().__init__()
        self.train = TensorDataset(self.images[:64], torch.zeros(64, 5))


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        ({}, NothingNew, "unlabelled set is empty"),
        ({"unlabelled": "unlabeled_dataset"}, LoaderData, "Did you mean 'unlabelled_dataset'"),
        ({}, SeveralLabels, "several labels"),
        ({"teacher": "nowhere.ckpt"}, LoaderData, "no checkpoint nowhere.ckpt"),
        ({"teacher": "best"}, LoaderData, "ModelCheckpoint with a monitor"),
        ({"max_drop": 0.1, "start_epoch": 0}, LoaderData, "to compare with"),
        ({"max_drop": 0.1, "monitor": "val_accuracy"}, LoaderData, "max_drop=None"),
    ],
)
def test_refused_before_the_first_step(
    arguments: dict, data: type[LightningDataModule], message: str, tmp_path
) -> None:
    tip = PseudoLabelCallback(**(QUIET | arguments))
    trainer, module = build(tip, folder=tmp_path, max_epochs=1)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module, datamodule=data())
    assert_same(dict(module.state_dict()), before)


def test_resume_with_another_unlabelled_set_is_refused(tmp_path: Path) -> None:
    keep = every_epoch(tmp_path / "kept")
    fit(PseudoLabelCallback(**QUIET), keep, folder=tmp_path, data=LoaderData(), max_epochs=2)
    data = LoaderData()
    data.unlabelled_dataset = lambda: TensorDataset(data.images[:10])  # type: ignore[method-assign]
    checkpoint = tmp_path / "kept/epoch-epoch=1.ckpt"
    with pytest.raises(MisconfigurationException, match="64 unlabelled samples, and now there are 10"):
        fit(PseudoLabelCallback(**QUIET), keep, folder=tmp_path, data=data, max_epochs=3, ckpt_path=checkpoint)


@pytest.mark.parametrize("arguments", [{"share": 1.0}, {"share": 0.0}, {"every_n_epochs": 0}, {"teacher": []}])
def test_arguments_that_make_no_sense(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PseudoLabelCallback(**arguments)


def test_labels_of_an_imbalanced_sampler_are_kept_in_balance(tmp_path: Path) -> None:
    from lightning_tips import ImbalancedSamplerCallback

    balance = ImbalancedSamplerCallback("oversample", num_samples=128, show=False)
    tip = PseudoLabelCallback(start_epoch=0, share=0.25, **(QUIET | {"epoch_size": None}))
    trainer = fit(tip, balance, folder=tmp_path, data=LoaderData(), max_epochs=1)
    labels = trainer.train_dataloader.dataset.tensors[1]
    order = tip.sampler.order()
    drawn = labels[order[order < len(labels)]].bincount()
    assert drawn.max() <= 2 * drawn.min()  # of the data it is six times
    assert len(tip.sampler) == 128


@pytest.mark.parametrize(
    ("given", "kind"),
    [({"class_path": "torch.nn.Flatten"}, nn.Flatten), (["a.ckpt", "b.ckpt"], list), ("best", str)],
)
def test_teacher_and_data_from_yaml(given: Any, kind: type) -> None:
    row = next(setting for setting in SETTINGS if setting.tip is PseudoLabelCallback)
    data = {"class_path": "torchvision.datasets.FakeData", "init_args": {"size": 5}}
    _, tip = row.make(teacher=given, unlabelled=data)
    assert isinstance(tip._teacher.given, kind)
    assert len(tip.unlabelled) == 5


def test_batches_without_known_inputs_are_refused_with_what_to_do(tmp_path: Path) -> None:
    def named(samples: list[Any]) -> dict[str, Tensor]:
        return {"scan": torch.stack([s[0] for s in samples]), "label": torch.stack([s[1] for s in samples])}

    class Scans(LoaderData):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(self.train, self.batch_size, shuffle=True, collate_fn=named)

    class Reads(PlainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["scan"], batch["label"]), batch_idx)

    tip = PseudoLabelCallback(max_drop=None)
    with pytest.raises(MisconfigurationException, match=r"PseudoLabelCallback: Cannot tell .*input_key"):
        fit(tip, folder=tmp_path, data=Scans(), module=Reads(), max_epochs=2)
