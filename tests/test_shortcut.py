"""Augmentation by class, and the probe for what goes wrong when it is of the rare class only."""

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from lightning_tips import ClassAugmentationCallback, ImbalancedSamplerCallback
from lightning_tips.core import replace_inputs
from lightning_tips.imbalance import Shortcut, augment_samples, minority_classes, shortcut_probe

from harness import PlainModule, fit


class Spotted(LightningDataModule):
    """Noise with a faint spot in images of the rare class, too faint to learn from so few."""

    def __init__(self, form: str = "pair") -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.form = form
        self.sets = []
        for _ in range(2):
            images = torch.rand(320, 1, 8, 8, generator=random)
            labels = torch.tensor([0] * 288 + [1] * 32)
            images[288:, :, 2:4, 2:4] += 0.2
            self.sets.append(TensorDataset(images, labels))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sets[0], 32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.sets[1], 64)


def darker(image: Tensor) -> Tensor:
    return image * 0.3


@pytest.mark.parametrize("classes", ["rare", "all"])
def test_literal_advice_is_caught_and_the_safe_way_is_not(classes, tmp_path: Path) -> None:
    tip = ClassAugmentationCallback(darker, classes=classes)
    run = {"folder": tmp_path, "data": Spotted(), "module": PlainModule(scheduler=False), "max_epochs": 12}
    sampler = ImbalancedSamplerCallback(show=False)
    if classes == "all":
        fit(tip, sampler, **run)
        assert tip.shortcut is None
        found = shortcut_probe(run["module"].eval(), *Spotted().sets[1].tensors, darker, [1])
        assert not found.suspicious
        return
    with pytest.warns(UserWarning, match="learnt that what looks augmented"):
        fit(tip, sampler, **run)
    assert tip.shortcut.suspicious
    assert tip.shortcut.total == 288
    assert [event.what for event in tip.events] == ["augments classes 1 only", "shortcut suspected"]


def test_only_chosen_classes_of_the_training_batches_are_changed(tmp_path: Path) -> None:
    seen: dict[str, list] = {"train": [], "val": []}

    class Watches(PlainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen["train"].append(batch)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen["val"].append(batch)
            super().validation_step(batch, batch_idx)

    fit(ClassAugmentationCallback(nn.Identity(), [1]), folder=tmp_path, data=Spotted(), module=Watches(), max_epochs=1)
    for images, _ in seen["train"]:
        assert images.amax() <= 1.2
    seen["train"].clear()
    fit(
        ClassAugmentationCallback(lambda i: i + 9, [1]), folder=tmp_path, data=Spotted(), module=Watches(), max_epochs=1
    )
    for images, labels in seen["train"]:
        assert torch.equal(images.amin((1, 2, 3)) > 8, labels == 1)
    for images, _ in seen["val"]:
        assert images.amax() <= 1.2


def test_each_sample_has_its_own_random_numbers_by_its_seed() -> None:
    images, seeds = torch.rand(1, 3, 8, 8).repeat(64, 1, 1, 1), torch.arange(64)
    augment = v2.ColorJitter(0.5, 0.5)
    before = torch.get_rng_state()
    augmented = augment_samples(images, augment, seeds)
    assert torch.equal(before, torch.get_rng_state())
    assert len(augmented.flatten(1).unique(dim=0)) == 64
    assert torch.equal(augment_samples(images[5:9], augment, seeds[5:9]), augmented[5:9])
    chosen = seeds % 2 == 0
    some = augment_samples(images, augment, seeds, chosen)
    assert torch.equal(some[~chosen], images[~chosen])
    assert torch.equal(some[chosen], augmented[chosen])


def test_what_cannot_be_augmented_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must keep the shape"):
        augment_samples(torch.rand(2, 3, 8, 8), v2.CenterCrop(4), torch.arange(2))
    with pytest.raises(ValueError, match="1 seeds for 2 images"):
        augment_samples(torch.rand(2, 3, 8, 8), nn.Identity(), torch.arange(1))
    with pytest.raises(ValueError, match="must be 'all', 'rare' or a list"):
        ClassAugmentationCallback(nn.Identity(), "minority")
    with pytest.raises(MisconfigurationException, match=r"classes \[2\], but there are only 0 to 1"):
        fit(ClassAugmentationCallback(nn.Identity(), [2]), folder=tmp_path, data=Spotted())

    class Vectors(Spotted):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(TensorDataset(torch.zeros(32, 4), torch.zeros(32).long()), 32)

    with pytest.raises(MisconfigurationException, match=r"the inputs are \(32, 4\)"):
        fit(ClassAugmentationCallback(nn.Identity()), folder=tmp_path, data=Vectors())


def test_minority_and_suspicion() -> None:
    assert minority_classes([100, 10, 50, 8]) == [1, 3]
    assert Shortcut(2, 60, 100).suspicious
    assert not Shortcut(2, 6, 100).suspicious
    assert not Shortcut(0, 2, 8).suspicious  # too few to say
    assert not Shortcut(0, 0, 0).suspicious
    assert Shortcut(10, 30, 100).gap == pytest.approx(0.2)


def test_inputs_are_replaced_in_any_batch() -> None:
    Pair = namedtuple("Pair", ["x", "y"])
    assert replace_inputs((1, 2), 9) == (9, 2)
    assert replace_inputs([1, 2, 3], 9) == [9, 2, 3]
    assert replace_inputs(Pair(1, 2), 9) == Pair(9, 2)
    batch = {"label": 1, "image": 2}
    assert replace_inputs(batch, 9) == {"label": 1, "image": 9}
    assert batch["image"] == 2
    assert replace_inputs({"scan": 1}, 9, "scan") == {"scan": 9}
    with pytest.raises(KeyError, match="input_key"):
        replace_inputs({"scan": 1}, 9)
