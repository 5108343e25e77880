"""Augmentation: every sample by its own seed, exact where it can be, right where it is computed; the callback."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as V

from lightning_tips import BatchAugmentationCallback, ClassWeightCallback
from lightning_tips.augmentation import (
    OPERATIONS,
    POLICIES,
    Blur,
    Brightness,
    Contrast,
    Crop,
    Erase,
    HorizontalFlip,
    Hue,
    Rotate,
    Saturation,
    Shift,
    VerticalFlip,
    augment_batch,
    guard_table,
    label_guard,
    mix_batch,
    read_policy,
    safe_operation,
)
from lightning_tips.augmentation.geometry import move_pixels, resample
from lightning_tips.augmentation.random_numbers import uniforms

from harness import PlainData, PlainModule, assert_same, bits, build, every_step, fit

MIXED = [*POLICIES["strong"], VerticalFlip(), Shift(3), v2.RandomErasing(p=0.5)]
POLICY_CASES = [*POLICIES, MIXED, [v2.TrivialAugmentWide()], [v2.RandAugment()]]


def photos(count: int = 8, channels: int = 3, side: int = 16, dtype: torch.dtype = torch.uint8) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    images = torch.rand(count, channels, 4, 4, generator=generator)
    images = F.interpolate(images, (side, side + 4), mode="bicubic").clamp(0, 1)
    return (images * 255).round().to(dtype) if dtype == torch.uint8 else images.to(dtype)


# ---- a function of the seed


@pytest.mark.parametrize("policy", POLICY_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_each_sample_is_a_function_of_its_seed(policy, dtype) -> None:
    images, seeds = photos(7, dtype=dtype), torch.tensor([5, -3, 2**62, 0, 7, 7, 1])
    whole = augment_batch(images, policy, seeds)
    assert whole.dtype == dtype
    assert whole.shape == images.shape
    order = torch.tensor([6, 2, 0, 5, 4, 1, 3])
    close = {"rtol": 0, "atol": 0 if dtype == torch.uint8 else 1e-6}  # a sum may run in another order
    torch.testing.assert_close(augment_batch(images[order], policy, seeds[order]), whole[order], **close)
    for n in range(7):
        torch.testing.assert_close(augment_batch(images[n : n + 1], policy, seeds[n : n + 1])[0], whole[n], **close)
    assert torch.equal(augment_batch(images, policy, seeds), whole)


def test_global_generators_and_images_are_left_alone() -> None:
    images = photos()
    kept = images.clone()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    augment_batch(images, MIXED, torch.arange(8))
    mix_batch(images, torch.arange(8), 8, mixup=0.4, cutmix=1.0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    assert torch.equal(images, kept)


def test_equal_images_become_as_many_different_ones() -> None:
    images = photos(1, side=32).expand(256, -1, -1, -1)
    for policy in ("standard", "strong"):
        assert len(augment_batch(images, policy, torch.arange(256)).flatten(1).unique(dim=0)) == 256


def test_numbers_are_uniform_and_unrelated() -> None:
    numbers = uniforms(torch.arange(4000), 3, 4).reshape(4000, 12)
    assert abs(numbers.mean(0) - 0.5).max() < 0.02
    assert abs(numbers.var(0) - 1 / 12).max() < 0.005
    correlations = np.corrcoef(np.concatenate([numbers[:-1], numbers[1:]], 1).T) - np.eye(24)
    assert abs(correlations).max() < 0.08
    longer = uniforms(torch.arange(4000), 5, 6)
    assert (longer[:, :3, :4].reshape(4000, 12) == numbers).all()  # more operations leave the first as they are


def test_chunks_cannot_be_told(monkeypatch) -> None:
    images, seeds = photos(33), torch.arange(33)
    whole = augment_batch(images, "strong", seeds)
    monkeypatch.setattr("lightning_tips.augmentation.batch.CHUNK_BYTES", 1)
    assert torch.equal(augment_batch(images, "strong", seeds), whole)


# ---- geometry


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_flips_are_exact(dtype, channels) -> None:
    images, seeds = photos(8, channels, dtype=dtype), torch.arange(8)
    assert torch.equal(augment_batch(images, [HorizontalFlip(p=1)], seeds), images.flip(3))
    assert torch.equal(augment_batch(images, [VerticalFlip(p=1)], seeds), images.flip(2))
    assert torch.equal(augment_batch(images, [HorizontalFlip(p=0), Rotate(15, p=0), Brightness(p=0)], seeds), images)
    some = augment_batch(images, [HorizontalFlip()], seeds)
    flipped = [torch.equal(some[n], images[n].flip(2)) for n in range(8)]
    assert flipped != [torch.equal(some[n], images[n]) for n in range(8)]
    assert 0 < sum(flipped) < 8


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("padding", "mode"), [("zeros", "constant"), ("border", "replicate")])
def test_shift_is_a_crop_of_the_padded_image(dtype, padding, mode) -> None:
    images, seeds = photos(64, dtype=dtype), torch.arange(64)
    moved = augment_batch(images, [Shift(3)], seeds, padding=padding)
    padded = F.pad(images.float(), (3, 3, 3, 3), mode=mode).to(dtype)
    height, width = images.shape[-2:]
    found = set()
    for n in range(64):
        places = [
            (y, x)
            for y in range(7)
            for x in range(7)
            if torch.equal(moved[n], padded[n, :, y : y + height, x : x + width])
        ]
        assert len(places) == 1
        found.add(places[0])
    assert {y for y, _ in found} == {x for _, x in found} == set(range(7))


def test_indexing_agrees_with_copying_and_with_interpolation() -> None:
    """The way of GPUs for flips and shifts, against that of CPUs and against grid_sample."""
    images = photos(40, dtype=torch.float32)
    maps = np.tile(np.eye(3), (40, 1, 1))
    random_numbers = np.random.default_rng(0)
    maps[:, 0, 0], maps[:, 1, 1] = random_numbers.choice([-1, 1], (2, 40))
    maps[:, :2, 2] = random_numbers.integers(-30, 30, (40, 2))  # some beyond the image
    for padding in ("zeros", "border", "reflection"):
        copied = torch.empty_like(images)
        move_pixels(images, np.arange(40), maps, copied, padding, 0.0)
        torch.testing.assert_close(copied, resample(images, maps, padding), rtol=0, atol=1e-4)
    as_on_gpu = torch.empty_like(images, dtype=torch.bfloat16)
    move_pixels(images.bfloat16(), np.arange(40), maps, as_on_gpu, "zeros", 0.0)
    copied = torch.empty_like(images)
    move_pixels(images, np.arange(40), maps, copied, "zeros", 0.0)
    assert torch.equal(as_on_gpu, copied.bfloat16())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_right_angles(dtype) -> None:
    images = photos(4, side=16, dtype=dtype)[..., :16]
    for quarter in (1, 2, 3):
        turned = augment_batch(images, [Rotate((90 * quarter, 90 * quarter))], torch.arange(4))
        torch.testing.assert_close(
            turned, images.rot90(quarter, (2, 3)), rtol=0, atol=0 if dtype == torch.uint8 else 1e-5
        )


@pytest.mark.parametrize("angle", [-40.0, 7.0, 30.0])
def test_rotation_is_that_of_torchvision(angle) -> None:
    images = photos(4, dtype=torch.float32)
    turned = augment_batch(images, [Rotate((angle, angle))], torch.arange(4))
    expected = V.rotate(images, angle, InterpolationMode.BILINEAR)
    inside = V.rotate(torch.ones_like(images), angle, InterpolationMode.BILINEAR) == 1  # edges are cut otherwise there
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(turned[inside], expected[inside], rtol=0, atol=1e-4)


def test_crop_enlarges_a_part() -> None:
    ramp = torch.linspace(0, 1, 32).expand(16, 1, 32, 32).contiguous()
    cut = augment_batch(ramp, [Crop((0.25, 0.25), ratio=(1.0, 1.0))], torch.arange(16))
    spread = cut[..., -1] - cut[..., 0]
    torch.testing.assert_close(spread, torch.full_like(spread, 0.5), rtol=0, atol=0.02)
    assert cut[:, 0, 0, 0].unique().numel() > 8


# ---- colours, blur, erasing


COLOURS = [
    (Brightness((0.7, 0.7)), lambda x: V.adjust_brightness(x, 0.7)),
    (Brightness((1.6, 1.6)), lambda x: V.adjust_brightness(x, 1.6)),
    (Contrast((0.5, 0.5)), lambda x: V.adjust_contrast(x, 0.5)),
    (Contrast((1.5, 1.5)), lambda x: V.adjust_contrast(x, 1.5)),
    (Saturation((0.0, 0.0)), lambda x: V.adjust_saturation(x, 0.0)),
    (Saturation((1.7, 1.7)), lambda x: V.adjust_saturation(x, 1.7)),
    (Hue((1 / 3, 1 / 3)), lambda x: V.adjust_hue(x, 1 / 3)),
    (Hue((-1 / 3, -1 / 3)), lambda x: V.adjust_hue(x, -1 / 3)),
]


@pytest.mark.parametrize(("operation", "expected"), COLOURS, ids=[str(o) for o, _ in COLOURS])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_colours_are_those_of_torchvision(operation, expected, dtype) -> None:
    images = photos(6, dtype=dtype)
    found = augment_batch(images, [operation], torch.arange(6))
    wanted = expected(images)
    tolerance = 2.0 if dtype == torch.uint8 else 1e-4  # torchvision cuts fractions of uint8 off, here they are rounded
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=tolerance)


def test_hue_between_the_thirds_is_near_that_of_torchvision() -> None:
    images = 0.35 + 0.3 * photos(6, dtype=torch.float32)
    for turn in (0.05, -0.1):
        found = augment_batch(images, [Hue((turn, turn))], torch.arange(6))
        assert (found - V.adjust_hue(images, turn)).abs().mean() < 0.02
        torch.testing.assert_close(found.mean(1), images.mean(1), rtol=0, atol=1e-5)


def test_colours_in_a_row_are_one_after_the_other() -> None:
    images = 0.4 + 0.2 * photos(6, dtype=torch.float32)  # far from the ends, so that nothing is cut off
    row = [Saturation((1.3, 1.3)), Brightness((0.9, 0.9)), Contrast((1.2, 1.2)), Hue((1 / 3, 1 / 3))]
    found = augment_batch(images, row, torch.arange(6))
    one_by_one = images
    for operation in row:
        one_by_one = augment_batch(one_by_one, [operation], torch.arange(6))
    torch.testing.assert_close(found, one_by_one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [3, 7])
def test_blur_is_that_of_torchvision(size) -> None:
    images = photos(4, dtype=torch.float32)
    found = augment_batch(images, [Blur((0.8, 0.8), size=size)], torch.arange(4))
    torch.testing.assert_close(found, V.gaussian_blur(images, [size, size], [0.8, 0.8]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "dark", "bright"), [(torch.uint8, 0, 255), (torch.float32, 0.0, 1.0)])
def test_erasing_fills_a_rectangle_of_the_asked_size(dtype, dark, bright) -> None:
    images = torch.full((64, 2, 20, 20), 0.4 * bright).to(dtype)
    for value, expected in ((0.0, dark), (1.0, bright)):
        erased = augment_batch(images, [Erase((0.1, 0.3), value=value, p=1.0)], torch.arange(64))
        holes = (erased == expected).all(1)
        shares = holes.float().mean((1, 2))
        assert 0.07 < shares.min() < shares.max() < 0.33
        for hole in holes:
            rows, columns = hole.any(1).sum(), hole.any(0).sum()
            assert rows * columns == hole.sum()
    assert 10 < sum(bool((e == dark).any()) for e in augment_batch(images, [Erase()], torch.arange(64))) < 54


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_any_number_of_channels_stays_in_its_range(channels, dtype) -> None:
    images = photos(5, channels, dtype=dtype)
    for policy in POLICIES:
        found = augment_batch(images, policy, torch.arange(5))
        assert found.dtype == dtype
        assert found.min() >= 0
        assert found.max() <= (255 if dtype == torch.uint8 else 1)
        assert not torch.equal(found, images)


def test_normalised_images_in_their_own_range() -> None:
    images = photos(6, dtype=torch.float32)
    plain = augment_batch(images, MIXED[:-1], torch.arange(6))
    scaled = augment_batch(images * 4 - 2, MIXED[:-1], torch.arange(6), value_range=(-2.0, 2.0))
    torch.testing.assert_close((scaled + 2) / 4, plain, rtol=0, atol=1e-5)


def test_layouts_of_memory_and_empty_batches() -> None:
    images, seeds = photos(6), torch.arange(6)
    expected = augment_batch(images, "strong", seeds)
    assert torch.equal(augment_batch(images.contiguous(memory_format=torch.channels_last), "strong", seeds), expected)
    assert torch.equal(
        augment_batch(photos(12)[::2], "light", seeds), augment_batch(photos(12)[::2].clone(), "light", seeds)
    )
    floats = photos(6, dtype=torch.float32)
    expected = augment_batch(floats, "strong", seeds)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment_batch(floats.clone().requires_grad_(), "strong", seeds), expected)
    assert augment_batch(images[:0], "strong", seeds[:0]).shape == (0, 3, 16, 20)
    assert augment_batch(photos(2, side=1), "strong", seeds[:2]).shape == (2, 3, 1, 5)


# ---- policies and errors


def test_policies_read_from_yaml() -> None:
    path = "torchvision.transforms.v2.RandomInvert"
    steps = read_policy(["HorizontalFlip", {"Rotate": {"degrees": [5, 10]}}, {"Erase": None}, {"class_path": path}])
    assert steps[:3] == [HorizontalFlip(), Rotate((5, 10)), Erase()]
    assert isinstance(steps[3], v2.RandomInvert)
    named = {"class_path": "lightning_tips.augmentation.Shift", "init_args": {"by": 2}}
    assert read_policy([named]) == [Shift(2)]
    assert all(read_policy([name]) == [cls()] for name, cls in OPERATIONS.items())


BAD_POLICIES = [
    ("stong", "Did you mean 'strong'"),
    (["HorizontalFlp"], "Did you mean 'HorizontalFlip'"),
    ([{"Rotate": {"degree": 3}}], "Did you mean 'degrees'"),
    ([{"Rotate": {"degrees": [3, 1]}}], "the lower end first"),
    ([{"Rotate": {"degrees": "a"}}], "a number or a pair"),
    ([{"Hue": {"amount": 0.7}}], "within -0.5 and 0.5"),
    ([{"Blur": {"size": 4}}], "odd"),
    ([{"Erase": {"p": 2}}], r"must lie in \[0, 1\]"),
    ([{"Shift": {"by": 1.5}}], "whole pixels"),
    ([{"class_path": "torchvision.transforms.v2.Nope"}], "cannot be imported"),
    ([{"Rotate": {}, "Hue": {}}], "dash of its own"),
    ({"Rotate": {}}, "a list of operations"),
    ([3], "no step of a policy"),
]


@pytest.mark.parametrize(("policy", "message"), BAD_POLICIES, ids=str)
def test_a_wrong_policy_is_answered(policy, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        augment_batch(photos(1), policy, torch.zeros(1, dtype=torch.long))
    with pytest.raises((ValueError, TypeError), match=message):
        BatchAugmentationCallback(policy)


BAD_IMAGES = [
    (photos()[0], r"images\[None\]"),
    (photos().permute(0, 2, 3, 1), "permute"),
    (photos().long(), "uint8"),
    (photos(dtype=torch.float32) * 2 - 1, "normalised"),
    (photos().float(), "Divide them by 255"),
    (torch.full((8, 3, 4, 8), float("nan")), "NaN"),
    ("images", "got str"),
]


@pytest.mark.parametrize(("images", "message"), BAD_IMAGES, ids=[m for _, m in BAD_IMAGES])
def test_wrong_images_are_answered(images, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        augment_batch(images, "standard", torch.arange(8))


def test_other_wrong_arguments_are_answered() -> None:
    for seeds in (torch.arange(7), torch.rand(8), 3):
        with pytest.raises(ValueError, match="8 integers"):
            augment_batch(photos(), "light", seeds)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="RGB"):
        augment_batch(photos(8, 1), ["Saturation"], torch.arange(8))
    with pytest.raises(ValueError, match="must keep shape"):
        augment_batch(photos(), [v2.CenterCrop(3)], torch.arange(8))
    with pytest.raises(ValueError, match="below the brightest"):
        augment_batch(photos(dtype=torch.float32), "light", torch.arange(8), value_range=(1, 0))


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

    class FakeTrainer:
        current_epoch = 0

    tip = BatchAugmentationCallback()
    addresses = {}
    for world, size in ((1, 8), (2, 4), (4, 2)):
        tip._batch_size, seeds = size, []
        for batch in range(2):
            tip._batch_idx = batch
            for rank in range(world):
                trainer = FakeTrainer()
                trainer.world_size, trainer.global_rank = world, rank  # type: ignore[attr-defined]
                places = [(batch * size + n) * world + rank for n in range(size)]  # DistributedSampler's
                seeds += zip(places, tip._seeds(trainer, None, size).tolist(), strict=True)  # type: ignore[arg-type]
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


def test_off_in_the_last_epochs(tmp_path: Path) -> None:
    tip = BatchAugmentationCallback(last_epochs_off=1, mixup=0.2, preview=False)
    module = train(tip, tmp_path, max_epochs=2)
    assert torch.equal(shown(module, 1), Numbered().images)
    assert module.seen["train"][-1][1].ndim == 1
    assert [(event.what, event.epoch) for event in tip.events][1:] == [("off", 1)]
    with pytest.raises(MisconfigurationException, match="max_epochs"):
        train(BatchAugmentationCallback(last_epochs_off=1), tmp_path, max_epochs=-1, max_steps=2)


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


# ---- the label guard, and the preview from the command line


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A network trained on digits at 16x16 with small shifts and turns; validation images and labels."""
    data = PlainData()
    images = F.interpolate(data.images, 16, mode="bilinear")
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(200):
        chosen = torch.arange(step * 64, step * 64 + 64) % 1000
        batch = augment_batch(images[chosen], [Shift(1), Rotate(10)], torch.arange(64) + step * 64)
        optimizer.zero_grad()
        F.cross_entropy(model(batch), data.labels[chosen]).backward()
        optimizer.step()
    return model.eval(), images[1000:], data.labels[1000:]


def test_guard_flags_what_changes_the_content(digits) -> None:
    rows = label_guard(*digits, [Rotate((180, 180)), Shift(1), Brightness(0.1)])
    flagged = {(row.operation.split("(")[0], row.label): row for row in rows if row.flagged()}
    assert {operation for operation, _ in flagged} == {"Rotate"}
    assert flagged["Rotate", 6].taken_for == 9
    assert flagged["Rotate", 9].taken_for == 6
    assert flagged["Rotate", 6].verdict == "becomes class 9"
    assert flagged["Rotate", 6].confidence < flagged["Rotate", 6].clean_confidence
    assert ("Rotate", 0) not in flagged
    table = guard_table(rows)
    assert "becomes 9" in table
    assert "Shift" not in table
    assert guard_table([row for row in rows if "Shift" in row.operation]).startswith("None of 10")


def test_guard_shrinks_a_range(digits) -> None:
    smaller = safe_operation(*digits, Rotate(180))
    assert isinstance(smaller, Rotate)
    assert 0 < smaller.degrees[1] < 180  # type: ignore[index]
    assert safe_operation(*digits, Shift(1)) == Shift(1)
    assert safe_operation(*digits, VerticalFlip()) is None


def test_preview_from_the_command_line(tmp_path: Path, capsys, monkeypatch) -> None:
    import yaml

    from lightning_tips.cli import main

    config = {
        "trainer": {"accelerator": "cpu", "callbacks": [{"class_path": "BatchAugmentationCallback"}]},
        "model": {"class_path": "ImageClassifier", "init_args": {"in_channels": 1}},
        "data": {"class_path": "DigitsDataModule"},
    }
    config["trainer"]["callbacks"][0]["init_args"] = {  # type: ignore[index]
        "policy": [
            "HorizontalFlip",
            {"Rotate": {"degrees": 15}},
            {"class_path": "torchvision.transforms.v2.RandomErasing"},
        ],
        "mixup": 0.2,
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("sys.argv", ["lightning-tips"])
    assert main(["preview", "--config", "run.yaml", "--out", "sheet.png"]) == 0
    assert Path("sheet.png").stat().st_size > 5000
    assert "HorizontalFlip, Rotate, RandomErasing, mixup 0.2" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "sheet.png"}  # nothing was trained
    config["trainer"]["callbacks"] = []
    Path("run.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match="no BatchAugmentationCallback"):
        main(["preview", "--config", "run.yaml"])
