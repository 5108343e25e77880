"""`augment_batch`: every sample by its own seed, exact where it can be, right where it is computed."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as V

from lightning_tips import BatchAugmentationCallback
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
    mix_batch,
    read_policy,
)
from lightning_tips.augmentation.geometry import move_pixels, resample
from lightning_tips.augmentation.random_numbers import uniforms

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
    last = augment_batch(images.contiguous(memory_format=torch.channels_last), "strong", seeds)
    assert torch.equal(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert expected.is_contiguous()
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
    ([{"Shift": {"by": "a"}}], "by='a' must be whole pixels"),
    ([{"HorizontalFlip": {"p": "x"}}], "p='x' must lie"),
    ([{"Erase": {"value": None}}], "value=None must lie"),
    ([{"Blur": {"size": 3.5}}], "odd"),
    ([{"class_path": "torchvision.transforms.v2.RandomInvert", "init_args": {"q": 1}}], "RandomInvert does not take"),
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
