"""By what `BatchAugmentationCallback` knows a sample, and which samples it chooses and shows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_augmentation import Numbered, Watching, shown
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset, default_collate

from lightning_tips import BatchAugmentationCallback
from lightning_tips.augmentation import HorizontalFlip, minority_classes

from harness import build, every_step
from processes import on_two_ranks


def forms(folder: Path, batch: int = 16, loader: Any = None, epochs: int = 1, **more: Any) -> tuple[Tensor, Watching]:
    """What each sample became, where its place in the epoch's order is not that in the dataset."""
    tip, module = BatchAugmentationCallback("strong", preview=False), Watching()
    arguments = {"max_epochs": epochs, "num_sanity_val_steps": 0}
    ckpt_path = more.pop("ckpt_path", None)
    trainer, _ = build(tip, *more.pop("parts", ()), folder=folder, module=module, **arguments | more)
    loader = loader or DataLoader(Numbered(), batch, shuffle=True)
    kind = type(loader)
    trainer.fit(module, loader, DataLoader(Numbered(), 64), ckpt_path=ckpt_path)
    assert type(loader) is kind  # as it was given
    return shown(module, size=min(64, sum(len(b[2]) for b in module.seen["train"]))), module


def test_a_sample_is_known_by_its_place_in_the_dataset(tmp_path: Path, capsys) -> None:
    """So neither the order nor batches nor workers matter."""
    expected, module = forms(tmp_path)
    assert not torch.equal(torch.cat([b[2] for b in module.seen["train"]]), torch.arange(64))
    loaders = {
        "in order": DataLoader(Numbered(), 64),
        "short last batch": DataLoader(Numbered(), 24, shuffle=True),
        "workers": DataLoader(Numbered(), 8, shuffle=True, num_workers=2),
        "another shuffle": DataLoader(Numbered(), 16, shuffle=True, generator=torch.Generator().manual_seed(5)),
        "batch sampler": DataLoader(
            Numbered(), batch_sampler=BatchSampler(SequentialSampler(range(63, -1, -1)), 16, False)
        ),
    }
    for name, loader in loaders.items():
        torch.testing.assert_close(forms(tmp_path, loader=loader)[0], expected, msg=name)
    assert "place in the epoch's order" not in capsys.readouterr().out

    # Several epochs, the workers kept or not: each in a form of its own, which is that of one process.
    expected = [shown(forms(tmp_path, epochs=3)[1], epoch) for epoch in range(3)]
    for kept in (True, False):
        loader = DataLoader(Numbered(), 8, shuffle=True, num_workers=1, persistent_workers=kept)
        module = forms(tmp_path, loader=loader, epochs=3)[1]
        for epoch in range(3):
            torch.testing.assert_close(shown(module, epoch), expected[epoch])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_sample_is_in_the_same_form_after_a_resume_in_mid_epoch(tmp_path: Path) -> None:
    expected, _ = forms(tmp_path / "whole", parts=(every_step(tmp_path / "kept"),))
    kept = next((tmp_path / "kept").glob("*step=2.ckpt"))
    for workers in (0, 2):
        loader, again = DataLoader(Numbered(), 16, shuffle=True, num_workers=workers), every_step(tmp_path / "again")
        _, module = forms(tmp_path, loader=loader, ckpt_path=kept, parts=(again,))
        assert len(module.seen["train"]) == 2  # torch's own shuffle does not go on where it was; the forms do
        for images, _, numbers in module.seen["train"]:
            torch.testing.assert_close(images, expected[numbers])


def on_a_rank(folder: Path, expected: str) -> list[int]:
    loader = DataLoader(Numbered(), 8, shuffle=True, num_workers=1, multiprocessing_context="fork")
    _, module = forms(folder, loader=loader, devices=2, strategy="ddp")
    numbers = torch.cat([b[2] for b in module.seen["train"]])
    torch.testing.assert_close(torch.cat([b[0] for b in module.seen["train"]]), torch.load(expected)[numbers])
    return numbers.tolist()


def test_two_ranks_show_each_sample_in_the_form_that_one_shows(tmp_path: Path) -> None:
    torch.save(forms(tmp_path)[0], tmp_path / "expected.pt")
    seen = on_two_ranks(tmp_path, on_a_rank, "expected.pt")
    assert sorted(seen[0] + seen[1]) == list(range(64))
    assert sorted(seen[0]) != list(range(0, 64, 2))  # shuffled


class Bunches(DataLoader):
    """Iterates in a way of its own."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__()))


def twice(parts: list[Any]) -> Any:
    """Two views of each image, one below the other."""
    images, labels, numbers = default_collate(parts)
    return torch.cat([images, images]), torch.cat([labels, labels]), torch.cat([numbers, numbers + 64])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda data: DataLoader(data, sampler=RandomSampler(data, True, 64)), "RandomSampler may draw a sample more"),
        (lambda data: Bunches(data, 8), "a Bunches does not tell"),
        (lambda data: DataLoader(data, 8, collate_fn=twice), "a batch of 8 samples holds 16 images"),
        (lambda data: DataLoader(data, batch_sampler=[[n, n] for n in range(32)]), "a list may draw a sample more"),
    ],
)
def test_where_samples_cannot_be_told_apart_their_place_in_the_order_decides(make, why, tmp_path: Path, capsys) -> None:
    _, module = forms(tmp_path, loader=make(Numbered()), epochs=2)
    out = capsys.readouterr().out
    assert why in out
    assert out.count("its place in the epoch's order decides") == 1
    clean, repeated = Numbered().images, 0
    first: dict[int, Tensor] = {}
    for images, _, numbers in module.seen["train"]:
        for image, number in zip(images, numbers.tolist(), strict=True):
            assert number % 64 not in first or not torch.equal(first[number % 64], image)  # repeats in other forms
            repeated += number % 64 in first
            first.setdefault(number % 64, image)
            assert image.shape == clean[0].shape
    assert repeated


def test_ranks_that_share_a_model_augment_alike(monkeypatch, tmp_path: Path) -> None:
    """Of four ranks two each may hold one model (tensor parallel): they draw the same samples."""
    trainer, _ = build(folder=tmp_path)
    monkeypatch.setattr(Trainer, "world_size", 4)
    monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", {"num_replicas": 2, "rank": 1})
    address = BatchAugmentationCallback()._address(trainer)
    assert (address.world_size, address.rank) == (2, 1)


def test_chosen_classes_that_are_not_there_are_refused(tmp_path: Path) -> None:
    """Nothing would be augmented, without a word."""
    with pytest.raises(ValueError, match=r"only_classes=\[\] augments nothing"):
        BatchAugmentationCallback(only_classes=[])
    images, labels = Numbered().images, Numbered().targets % 2 + 1  # of the classes 0, 1, 2 none is of the first
    loader = DataLoader(TensorDataset(images, labels), 16)
    for only, message in (([0], "no training samples"), ("minority", "equally many")):
        balanced = TensorDataset(images[:2], torch.tensor([1, 2])) if only == "minority" else loader.dataset
        trainer, module = build(BatchAugmentationCallback(only_classes=only), folder=tmp_path, module=Watching())
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(module, DataLoader(balanced, 2), DataLoader(balanced, 2))
    assert minority_classes([0, 50, 50, 0]) == []
    assert minority_classes([0, 50, 40, 0]) == [2]


def test_the_contact_sheet_shows_images_of_the_chosen_classes(tmp_path: Path, monkeypatch) -> None:
    drawn: list[tuple[Tensor, list[Tensor], list[str]]] = []
    monkeypatch.setattr(
        "lightning_tips.augmentation.callback.contact_sheet",
        lambda clean, forms, labels, path, *_: (drawn.append((clean, forms, labels)), path.write_bytes(b"")),
    )

    class LateOnes(Numbered):
        """Its only two nines come in the second batch."""

        def __init__(self) -> None:
            super().__init__()
            self.targets = torch.zeros(64, dtype=torch.long)
            self.targets[[29, 30]] = 9

    module = Watching()
    tip = BatchAugmentationCallback([HorizontalFlip(p=1)], only_classes=[9])
    trainer, _ = build(tip, folder=tmp_path, module=module, max_epochs=1, num_sanity_val_steps=0)
    monkeypatch.setattr("lightning_tips.augmentation.callback.log_picture", lambda *_: None)
    trainer.fit(module, DataLoader(LateOnes(), 16), DataLoader(Numbered(), 64))
    ((clean, forms, labels),) = drawn
    assert labels == ["9", "9", *["0"] * 6]
    for form in forms:
        assert torch.equal(form[:2], clean[:2].flip(3))
        assert torch.equal(form[2:], clean[2:])
