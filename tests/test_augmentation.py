"""`BatchAugmentationCallback` in a run, and mixing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_tips import BatchAugmentationCallback, ClassWeightCallback
from lightning_tips.augmentation import (
    HorizontalFlip,
    Rotate,
    mix_batch,
)
from lightning_tips.augmentation.address import Address
from lightning_tips.core import inputs_of, targets_of

from harness import PlainData, PlainModule, assert_same, bits, build, every_step, fit


def photos(count: int = 8, channels: int = 3, side: int = 16, dtype: torch.dtype = torch.uint8) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    images = torch.rand(count, channels, 4, 4, generator=generator)
    images = F.interpolate(images, (side, side + 4), mode="bicubic").clamp(0, 1)
    return (images * 255).round().to(dtype) if dtype == torch.uint8 else images.to(dtype)


# ---- mixing


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_mixed_images_and_targets_are_in_the_same_proportion(dtype) -> None:
    top = 255 if dtype == torch.uint8 else 1
    targets = torch.arange(50) % 2
    images = (targets * top).to(dtype)[:, None, None, None].repeat(1, 3, 10, 12)  # its brightness tells the class
    for alphas in ({"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 0.3, "cutmix": 1.0}):
        mixed, soft = mix_batch(images, targets, 2, **alphas, seed=3)
        assert mixed.dtype == dtype
        assert soft.shape == (50, 2)
        torch.testing.assert_close(soft.sum(1), torch.ones(50))
        torch.testing.assert_close(mixed.float().mean((1, 2, 3)) / top, soft[:, 1], rtol=0, atol=0.003)
        assert soft[:, 1].unique().numel() > 10
        again, _ = mix_batch(images, targets, 2, **alphas, seed=3)
        assert torch.equal(again, mixed)
        assert not torch.equal(mix_batch(images, targets, 2, **alphas, seed=4)[0], mixed)
        if alphas == {"cutmix": 1.0}:
            assert set(mixed.unique().tolist()) <= {0, top}
    untouched, soft = mix_batch(images, targets, 2)
    assert torch.equal(untouched, images)
    assert torch.equal(soft, F.one_hot(targets, 2).float())


def test_targets_of_several_kinds_mix() -> None:
    images = photos(6, dtype=torch.float32)
    rows = torch.eye(6)
    assert torch.equal(mix_batch(images, rows, None, mixup=0.4)[1], mix_batch(images, torch.arange(6), 6, mixup=0.4)[1])
    assert mix_batch(images, torch.arange(6)[:, None], 6, mixup=0.4)[1].shape == (6, 6)
    for binary in (torch.tensor([0.0, 1, 1, 0, 1, 0]), torch.tensor([[0.0], [1], [1], [0], [1], [0]])):
        mixed = mix_batch(images, binary, None, cutmix=1.0)[1]
        assert mixed.shape == binary.shape
        assert 0 <= mixed.min() <= mixed.max() <= 1


@pytest.mark.parametrize(
    ("targets", "classes", "message"),
    [
        (torch.rand(6) * 9, None, "for classification"),
        (torch.zeros(6, 4, 4), 2, "masks"),
        (torch.arange(6), None, "num_classes"),
        (torch.arange(6), 5, "from 0 to 5"),
        (torch.arange(5), 5, "5 targets"),
    ],
)
def test_targets_that_cannot_be_mixed_are_refused(targets, classes, message) -> None:
    with pytest.raises(ValueError, match=message):
        mix_batch(photos(6), targets, classes, mixup=0.2)


# ---- the callback


class Watching(PlainModule):
    """Keeps the batches that it is given. Takes batches in any form, and soft targets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[Any]] = {"train": [], "val": []}

    def training_step(self, batch: Any) -> Tensor:  # without batch_idx, as a module may
        self.seen["train"].append(batch)
        images, labels = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch[:2]
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["val"].append(batch)


class Numbered(Dataset):
    """Digits with their own numbers, as tuples or dicts."""

    def __init__(self, form: str = "tuple", size: int = 64) -> None:
        data = PlainData()
        self.images, self.targets, self.form = data.images[:size], data.labels[:size], form

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, n: int) -> Any:
        parts = (self.images[n], self.targets[n], n)
        return dict(zip(("image", "label", "number"), parts, strict=True)) if self.form == "dict" else parts


def train(tip: BatchAugmentationCallback, folder: Path, form: str = "tuple", batch: int = 16, **more: Any) -> Watching:
    module = more.pop("module", None) or Watching()
    loader = DataLoader(Numbered(form), batch)
    arguments = {"max_epochs": 1, "num_sanity_val_steps": 0} | more
    trainer, module = build(tip, folder=folder, module=module, **arguments)
    trainer.fit(module, loader, DataLoader(Numbered(form), 64))
    return module


def shown(module: Watching, epoch: int = 0, size: int = 64) -> Tensor:
    """What an epoch showed, by the samples' numbers."""
    batches = [(b["image"], b["number"]) if isinstance(b, dict) else (b[0], b[2]) for b in module.seen["train"]]
    images, numbers = (torch.cat(part) for part in zip(*batches, strict=True))
    part = slice(epoch * size, (epoch + 1) * size)
    return images[part][numbers[part].argsort()]


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_training_batches_only_of_any_form(form, tmp_path: Path) -> None:
    module = train(BatchAugmentationCallback("standard"), tmp_path, form, max_epochs=2)
    clean = Numbered().images
    first, second = shown(module, 0), shown(module, 1)
    for images in (first, second):
        assert sum(torch.equal(a, b) for a, b in zip(images, clean, strict=True)) < 3
    assert not torch.equal(first, second)  # every epoch in another form
    for batch in module.seen["val"]:
        assert torch.equal(batch["image"] if form == "dict" else batch[0], clean)
    assert len(list(tmp_path.rglob("augmentation.png"))) == 1


@pytest.mark.parametrize(
    ("form", "keys"),
    [
        (lambda image, label: ((label, image), label), {"input_key": "0.1"}),
        (lambda image, label: {"views": {"image": image}, "label": label}, {"input_key": "views.image"}),
        (
            lambda image, label: [{"a": [image, 0]}, {"b": {"c": label}}],
            {"input_key": "0.a.0", "target_key": "1.b.c", "mixup": 0.4},
        ),
    ],
)
def test_images_are_found_in_nested_batches(form, keys, tmp_path: Path) -> None:
    class Nested(Numbered):
        def __getitem__(self, n: int) -> Any:
            return form(self.images[n], self.targets[n])

    class Module(Watching):
        def training_step(self, batch: Any) -> Tensor:
            images, labels = inputs_of(batch, keys["input_key"]), targets_of(batch, keys.get("target_key"))
            self.seen["train"].append((batch, images))
            if "mixup" in keys:
                assert labels.shape == (16, 10)
                assert (batch[0]["a"][1] == 0).all()  # the rest of the batch is as it was
            return self(images).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    module = Module()
    trainer, _ = build(BatchAugmentationCallback("standard", **keys), folder=tmp_path, max_epochs=1, module=module)
    loaders = DataLoader(Nested(), 16), DataLoader(Nested(), 64)
    trainer.fit(module, *loaders)
    clean = Numbered().images
    seen = torch.cat([images for _, images in module.seen["train"]])
    assert (seen != clean).flatten(1).any(1).sum() > 56
    assert len(list(tmp_path.rglob("augmentation.png"))) == 1
    wrong = BatchAugmentationCallback(input_key="views.scan", preview=False)
    with pytest.raises(MisconfigurationException, match=r"Callback: The batch has no input under 'views\.scan'"):
        build(wrong, folder=tmp_path, max_epochs=1, module=module)[0].fit(module, *loaders)


def test_manual_optimization_and_several_calls_of_a_step(tmp_path: Path) -> None:
    class Manual(Watching):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch))
            optimizer.step()

    assert torch.equal(
        shown(train(BatchAugmentationCallback(), tmp_path, module=Manual())),
        shown(train(BatchAugmentationCallback(), tmp_path)),
    )

    class Closures(Watching):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    module = train(BatchAugmentationCallback("light", mixup=0.2), tmp_path, module=Closures())
    seen = module.seen["train"]
    assert len(seen) > 8
    assert torch.equal(seen[0][0], seen[1][0])  # the same batch once more, in the same form
    assert torch.equal(seen[0][1], seen[1][1])


def test_equal_images_in_all_batches_become_different_ones(tmp_path: Path) -> None:
    """Also in modules whose training step is not told the number of the batch."""
    Numbered.__getitem__, kept = lambda self, n: (self.images[0], self.targets[0], n), Numbered.__getitem__
    try:
        module = train(BatchAugmentationCallback([Rotate(30)], preview=False), tmp_path)
    finally:
        Numbered.__getitem__ = kept
    assert len(shown(module).flatten(1).unique(dim=0)) == 64


def test_batch_size_workers_and_ranks_do_not_matter(tmp_path: Path) -> None:
    expected = shown(train(BatchAugmentationCallback(preview=False), tmp_path))
    other = shown(train(BatchAugmentationCallback(preview=False), tmp_path, batch=24))  # the last one is short
    torch.testing.assert_close(other, expected)
    assert not torch.equal(shown(train(BatchAugmentationCallback(preview=False, seed=1), tmp_path)), expected)


def test_samples_that_are_known_by_their_place_are_the_same_on_all_ranks() -> None:
    addresses = {}
    for world, size in ((1, 8), (2, 4), (4, 2)):
        seeds: list[tuple[int, int]] = []
        for batch in range(2):
            for rank in range(world):
                address = Address(seed=0, epoch=0, batch_idx=batch, batch_size=size, world_size=world, rank=rank)
                places = [(batch * size + n) * world + rank for n in range(size)]  # DistributedSampler's
                seeds += zip(places, address.sample_seeds(size).tolist(), strict=True)
        addresses[world] = dict(seeds)
    assert addresses[1] == addresses[2] == addresses[4]
    assert len(set(addresses[1].values())) == 16


def test_by_the_samples_own_numbers(tmp_path: Path) -> None:
    tip = BatchAugmentationCallback(preview=False, sample_key="number")
    expected = shown(train(tip, tmp_path, "dict"))
    tip = BatchAugmentationCallback(preview=False, sample_key=2)
    torch.testing.assert_close(shown(train(tip, tmp_path, batch=7)), expected)
    with pytest.raises(MisconfigurationException, match="sample_key='nr'"):
        train(BatchAugmentationCallback(sample_key="nr"), tmp_path, "dict")


def test_resumed_run_with_mixing_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    def tip() -> BatchAugmentationCallback:
        return BatchAugmentationCallback("strong", mixup=0.2, cutmix=1.0, preview=False)

    whole = bits(fit(tip(), every_step(tmp_path / "kept"), folder=tmp_path, max_epochs=2))
    for step in (2, 5):
        kept = next((tmp_path / "kept").glob(f"*step={step}.ckpt"))
        resumed = fit(tip(), every_step(tmp_path / "kept"), folder=tmp_path, max_epochs=2, ckpt_path=kept)
        assert_same(bits(resumed), whole)


def test_mixed_targets_reach_the_loss(tmp_path: Path) -> None:
    tip = BatchAugmentationCallback([], mixup=0.4, cutmix=1.0)
    module = train(tip, tmp_path)
    for _, targets, _ in module.seen["train"]:
        assert targets.shape == (16, 10)
        assert (targets.amax(1) < 1).sum() > 0
    assert [event.what for event in tip.events] == ["mixup 0.4, cutmix 1"]


class TakesIndices(Watching):
    def training_step(self, batch: Any) -> Tensor:
        return F.nll_loss(self(batch[0]).log_softmax(1), batch[1])


def test_losses_that_cannot_take_mixed_targets_are_refused(tmp_path: Path) -> None:
    module = TakesIndices()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=r"does not take mixed targets.*nn\.CrossEntropyLoss"):
        train(BatchAugmentationCallback(mixup=0.2), tmp_path, module=module)
    for name, value in module.named_parameters():
        assert torch.equal(value, before[name])
    module = Watching()
    module.loss = nn.NLLLoss()
    with pytest.raises(MisconfigurationException, match=r"NLLLoss \('loss'\) takes class indices only"):
        train(BatchAugmentationCallback(mixup=0.2), tmp_path, module=module)
    with pytest.raises(MisconfigurationException, match="no class to take a weight from"):
        fit(BatchAugmentationCallback(mixup=0.2), ClassWeightCallback(functional=True), folder=tmp_path)


def test_chosen_classes_only(tmp_path: Path) -> None:
    data = Numbered()
    counts = data.targets.bincount(minlength=10)
    for only in ([3, 5], "minority"):
        tip = BatchAugmentationCallback([HorizontalFlip(p=1)], only_classes=only, preview=False)
        images = shown(train(tip, tmp_path))
        chosen = [3, 5] if only != "minority" else (counts < counts.float().mean()).nonzero()[:, 0].tolist()
        belong = torch.isin(data.targets, torch.tensor(chosen))
        assert torch.equal(images[belong], data.images[belong].flip(3))
        assert torch.equal(images[~belong], data.images[~belong])
    with pytest.raises(MisconfigurationException, match="0 to 9"):
        train(BatchAugmentationCallback(only_classes=[10]), tmp_path)
    for arguments in ({"only_classes": "rare"}, {"only_classes": [1], "mixup": 0.1}):
        with pytest.raises(ValueError, match="only_classes"):
            BatchAugmentationCallback(**arguments)  # type: ignore[arg-type]


def test_classes_are_not_counted_in_several_loaders(tmp_path: Path) -> None:
    keys = {"input_key": "a.0", "target_key": "a.1", "preview": False}

    def run(**arguments: Any) -> Watching:
        module = Watching()
        module.training_step = lambda batch: Watching.training_step(module, batch["a"])  # type: ignore[method-assign]
        tip = BatchAugmentationCallback(["Brightness"], **keys, **arguments)
        trainer, _ = build(tip, folder=tmp_path, max_epochs=1, module=module)
        trainer.fit(module, {name: DataLoader(Numbered(), 32) for name in "ab"}, DataLoader(Numbered(), 64))
        return module

    with pytest.raises(MisconfigurationException, match="There are 2 training loaders"):
        run(only_classes="minority")
    with pytest.raises(MisconfigurationException, match="Pass num_classes"):
        run(mixup=0.2)
    assert run(mixup=0.2, num_classes=10).seen["train"][0][1].shape == (32, 10)


def test_off_in_the_last_epochs(tmp_path: Path) -> None:
    tip = BatchAugmentationCallback(last_epochs_off=1, mixup=0.2, preview=False)
    module = train(tip, tmp_path, max_epochs=2)
    assert torch.equal(shown(module, 1), Numbered().images)
    assert module.seen["train"][-1][1].ndim == 1
    assert [(event.what, event.epoch) for event in tip.events][1:] == [("off", 1)]
    with pytest.raises(MisconfigurationException, match="max_epochs"):
        train(BatchAugmentationCallback(last_epochs_off=1), tmp_path, max_epochs=-1, max_steps=2)
    with pytest.raises(MisconfigurationException, match="leaves no epoch"):
        train(BatchAugmentationCallback(last_epochs_off=2), tmp_path, max_epochs=2)


def test_everything_is_removed_afterwards(tmp_path: Path) -> None:
    class Fails(Watching):
        def training_step(self, batch: Any) -> Tensor:
            raise ArithmeticError

    for module in (Watching(), Fails()):
        trainer, _ = build(BatchAugmentationCallback(preview=False), folder=tmp_path, max_epochs=1, module=module)
        try:
            trainer.fit(module, DataLoader(Numbered(), 32), DataLoader(Numbered(), 64))
        except ArithmeticError:
            assert isinstance(module, Fails)
        assert "training_step" not in vars(trainer.strategy)


def test_batches_that_are_no_images_are_refused(tmp_path: Path) -> None:
    class Rows(Numbered):
        def __getitem__(self, n: int) -> Any:
            return self.images[n].flatten(), self.targets[n]

    module = Watching()
    trainer, _ = build(BatchAugmentationCallback(), folder=tmp_path, max_epochs=1, module=module)
    with pytest.raises(MisconfigurationException, match=r"\(B, C, H, W\)"):
        trainer.fit(module, DataLoader(Rows(), 32), DataLoader(Numbered(), 64))
    with pytest.raises(ValueError, match="nothing to do"):
        BatchAugmentationCallback([])


def test_last_epochs_that_max_steps_cuts_off_are_told_of(tmp_path):
    tip = BatchAugmentationCallback("light", last_epochs_off=1, preview=False)
    with pytest.warns(UserWarning, match="max_steps=8 ends the run before the last 1 of max_epochs=6"):
        fit(tip, folder=tmp_path, max_epochs=6, max_steps=8)
