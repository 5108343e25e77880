"""`augment_batch`: each image of a batch with parameters of its own, which are a function of its seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_tips.augmentation.colour import blur, change_colours
from lightning_tips.augmentation.geometry import Padding, exact_maps, move_pixels, resample
from lightning_tips.augmentation.operations import (
    NUMBERS,
    Blur,
    ColourOperation,
    GeometryOperation,
    Operation,
)
from lightning_tips.augmentation.policies import Policy, Step, read_policy
from lightning_tips.augmentation.random_numbers import hashed, uniforms

__all__ = ["augment_batch", "check_images"]

CHUNK_BYTES = 3 << 19
"""Floats of as many images as are worked on at a time on a CPU: what stays in its cache."""

Array = NDArray[np.float64]


@torch.no_grad()
def augment_batch(
    images: Tensor,
    policy: Policy,
    seeds: Tensor,
    *,
    value_range: tuple[float, float] | None = None,
    padding: Padding = "zeros",
    check: bool = True,
) -> Tensor:
    """Augments each image of a batch with parameters of its own.

    What becomes of an image depends on the image, the policy and its seed, and on nothing else: not on the rest of the
    batch, its place in it, or what was drawn before. Global random generators are left as they were. (Across devices
    the parameters are equal; the pixels are so up to the rounding of the arithmetic.)

    The order is: geometry, then colours, then blur, then erasing, each kind in the order of the list. So pixels are
    interpolated once, whatever the list. A transform of another package is applied where it stands: what is before it
    in the list is done before, the rest afterwards.

    Args:
        images: (B, C, H, W): uint8, or floats within ``value_range``. Not changed.
        policy: See :func:`~lightning_tips.augmentation.read_policy`.
        seeds: (B,) integers.
        value_range: Darkest and brightest value of float images; by default (0, 1). Give it for normalised images;
            what leaves it is cut off.
        padding: What comes in from beyond the edge: ``"zeros"`` (the dark end of the range), ``"border"`` or
            ``"reflection"``.
        check: Whether to look for values out of the range, which on a GPU waits for it.

    Returns:
        A new tensor of the same shape, dtype and memory format. Flips and shifts alone are exact to the bit; everything
        else is computed in float32 and, for uint8, rounded to the nearest.

    Raises:
        ValueError: For images, seeds or a policy that it cannot work with.
        TypeError: For another dtype.

    Example:
        >>> images = torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2)
        >>> augment_batch(images, [{"HorizontalFlip": {"p": 1.0}}], torch.tensor([0, 1]))[0, 0].tolist()
        [[1, 0], [3, 2]]
    """
    steps = _fitting(read_policy(policy), images, named=isinstance(policy, str))
    low, high = check_images(images, value_range, check)
    if not isinstance(seeds, Tensor) or seeds.shape != images.shape[:1] or seeds.is_floating_point():
        raise ValueError(f"seeds must be a tensor of {len(images)} integers, one for each image; got {_what(seeds)}.")
    numbers = uniforms(seeds.long(), len(steps), NUMBERS)
    last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    result = torch.empty_like(images, memory_format=torch.channels_last if last else torch.contiguous_format)
    size = max(1, CHUNK_BYTES // (4 * max(1, images[:1].numel()))) if images.device.type == "cpu" else len(images)
    with torch.autocast(images.device.type, enabled=False):  # it would take the colours' matrices to half precision
        for start in range(0, len(images), max(1, size)):
            part = slice(start, start + size)
            result[part] = _through(images[part].detach(), steps, numbers[part], seeds[part], low, high, padding)
    return result


def _through(
    chunk: Tensor, steps: Sequence[Step], numbers: Array, seeds: Tensor, low: float, high: float, padding: Padding
) -> Tensor:
    """A few images through all steps: neighbouring operations of ours together, transforms of others one by one."""
    for is_own, group in groupby(enumerate(steps), lambda pair: isinstance(pair[1], Operation)):
        members = list(group)
        if is_own:
            columns = [n for n, _ in members]
            chunk = _Chunk(chunk, low, high, padding).run([step for _, step in members], numbers[:, columns])
        else:
            for n, transform in members:
                chunk = _one_by_one(chunk, transform, seeds, n)  # type: ignore[arg-type]
    return chunk


class _Chunk:
    """A few images on their way through neighbouring operations."""

    def __init__(self, images: Tensor, low: float, high: float, padding: Padding) -> None:
        self.images, self.low, self.top, self.padding = images, low, high - low, padding
        self.height, self.width = images.shape[-2:]

    def run(self, operations: Sequence[Any], numbers: Array) -> Tensor:
        """Applies ``operations``, with uniform ``numbers`` (B, operations, NUMBERS)."""
        count = len(self.images)
        maps, colours, factors, blurs, erases = np.tile(np.eye(3), (count, 1, 1)), [], [], [], []
        for n, operation in enumerate(operations):
            own = numbers[:, n]
            if isinstance(operation, GeometryOperation):
                maps = maps @ operation.affine(own, self.height, self.width)
            elif isinstance(operation, ColourOperation):
                colours.append(operation)
                factors.append(operation.factors(own))
            elif isinstance(operation, Blur):
                blurs.append((operation, operation.drawn(own), own))
            else:
                erases.append((operation, operation.drawn(own), own))

        nothing, straight = exact_maps(maps)
        coloured = np.zeros(count, bool)
        for operation, factor in zip(colours, factors, strict=True):
            coloured |= factor != operation.neutral
        computed = ~straight | coloured
        for _, chosen, _ in blurs:
            computed |= chosen

        result = self.images if nothing.all() else self._moved(maps, nothing, straight)
        places = np.flatnonzero(computed)
        if len(places):
            work = self._load(result, places)
            if len(bent := np.flatnonzero(~straight[places])):
                work = _change(work, bent, partial(resample, maps=maps[places[bent]], padding=self.padding))
            if len(changed := np.flatnonzero(coloured[places])):
                parts = [factor[places[changed]] for factor in factors]
                work = _change(work, changed, partial(change_colours, operations=colours, factors=parts, top=self.top))
            for operation, chosen, own in blurs:
                if len(here := np.flatnonzero(chosen[places])):
                    kernels = operation.kernels(own[places[here]])
                    work = _change(work, here, partial(blur, kernels=kernels))
            result = self._store(work, places, result)
        for operation, chosen, own in erases:
            if chosen.any():
                result = result.clone() if result is self.images else result
                boxes = operation.boxes(own, self.height, self.width).tolist()
                for place in np.flatnonzero(chosen).tolist():
                    top, bottom, left, right = boxes[place]
                    value = self.low + operation.value * self.top
                    result[place, :, top:bottom, left:right] = value if result.is_floating_point() else round(value)
        return result

    def _moved(self, maps: Array, nothing: NDArray[np.bool_], straight: NDArray[np.bool_]) -> Tensor:
        """The images, with those that are only flipped and shifted in their new form."""
        result = torch.empty_like(self.images, memory_format=torch.contiguous_format)
        kept = np.flatnonzero(nothing | ~straight)
        if len(kept):
            at = _index(kept, len(result), result.device)
            result[at] = self.images[at]
        moved = np.flatnonzero(straight & ~nothing)
        if len(moved):
            move_pixels(self.images, moved, maps[moved], result, self.padding, self.low)
        return result

    def _load(self, images: Tensor, places: NDArray[np.int64]) -> Tensor:
        """Chosen images as float32 with the dark end at 0, never a view."""
        work = images[_index(places, len(images), images.device)].to(torch.float32, copy=True)
        return work.sub_(self.low) if self.low else work

    def _store(self, work: Tensor, places: NDArray[np.int64], result: Tensor) -> Tensor:
        if self.images.dtype == torch.uint8:
            # The conversion cuts the fraction off; straight to uint8 it takes six times as long.
            work = work.add_(0.5).clamp_(0.0, 255.0).to(torch.int32)
        else:
            work.clamp_(0.0, self.top).add_(self.low)
        if len(places) == len(result):
            return work.to(result.dtype)
        result = result.clone() if result is self.images else result
        result[_index(places, len(result), result.device)] = work.to(result.dtype)
        return result


def _index(places: NDArray[np.int64], count: int, device: torch.device) -> Any:
    """What picks ``places`` from ``count`` samples; a slice, and so no copy, where that is all of them."""
    return slice(None) if len(places) == count else torch.from_numpy(places).to(device)


def _change(work: Tensor, places: NDArray[np.int64], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Changes some of the samples in ``work``."""
    if len(places) == len(work):
        return change(work)
    at = torch.from_numpy(places).to(work.device)
    work[at] = change(work[at])
    return work


def _one_by_one(images: Tensor, transform: Callable[[Tensor], Tensor], seeds: Tensor, number: int) -> Tensor:
    """Applies a transform that draws from torch's global generators, each image under a seed of its own."""
    words = hashed(hashed(seeds.cpu().long().numpy().view(np.uint64)), number)
    result = torch.empty_like(images, memory_format=torch.contiguous_format)
    generators = [torch.default_generator]
    if images.is_cuda:
        number = torch.cuda.current_device() if images.device.index is None else images.device.index
        generators.append(torch.cuda.default_generators[number])
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        for place, word in enumerate(words.tolist()):
            for generator in generators:  # torch.manual_seed looks at every kind of device and takes a millisecond
                generator.manual_seed(word >> 1)
            changed = transform(images[place])
            if not isinstance(changed, Tensor) or changed.shape != images[place].shape or changed.dtype != images.dtype:
                raise ValueError(
                    f"{type(transform).__name__} turned an image of {_what(images[place])} into {_what(changed)}; a"
                    " transform in a policy must keep shape and dtype."
                )
            result[place] = changed
    return result


def check_images(images: Any, value_range: tuple[float, float] | None, values: bool = True) -> tuple[float, float]:
    """Raises unless these are images as :func:`augment_batch` takes them.

    Returns:
        The darkest and the brightest value.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        hint = " Add the dimension of the batch: images[None]." if getattr(images, "ndim", 0) == 3 else ""
        raise ValueError(f"Images must be a tensor (B, C, H, W), got {_what(images)}.{hint}")
    if images.shape[-1] <= 4 < images.shape[1]:
        raise ValueError(
            f"Images of the shape {tuple(images.shape)} look like (B, H, W, C); use images.permute(0, 3, 1, 2)."
        )
    if 0 in images.shape[1:]:
        raise ValueError(f"Images of the shape {tuple(images.shape)} have no pixels.")
    if images.dtype == torch.uint8:
        if value_range is not None and tuple(value_range) != (0, 255):
            raise ValueError(f"value_range={value_range} is for float images; uint8 ones reach from 0 to 255.")
        return 0.0, 255.0
    if not images.is_floating_point():
        raise TypeError(
            f"Images must be uint8 from 0 to 255 or floats, got {images.dtype}; convert them with"
            " images.to(torch.uint8) or torchvision.transforms.v2.ToDtype(torch.float32, scale=True)."
        )
    low, high = (0.0, 1.0) if value_range is None else (float(value_range[0]), float(value_range[1]))
    if not low < high:
        raise ValueError(f"value_range={value_range}: the darkest value must be below the brightest.")
    if values and images.numel():
        least, most = (float(value) for value in images.aminmax())
        slack = 1e-3 * (high - low)  # resizing and half precision overshoot a little
        if not (least >= low - slack and most <= high + slack):
            raise ValueError(_advice(least, most, low, high))
    return low, high


def _advice(least: float, most: float, low: float, high: float) -> str:
    found = f"Images have values from {least:.4g} to {most:.4g}, out of the range {low:g} to {high:g}."
    if least != least or most != most:
        return "Images have values that are no numbers (NaN); look at the dataset."
    if least < 0:
        return (
            f"{found} Are they normalised? Augment before normalising, or pass value_range=(darkest, brightest), for"
            f" example value_range=({least:.3g}, {most:.3g})."
        )
    if 1 < most <= 255:
        return f"{found} Divide them by 255, convert them to uint8, or pass value_range=(0, 255)."
    return f"{found} Scale them to 0 to 1, or pass value_range=(darkest, brightest)."


def _fitting(steps: list[Step], images: Any, named: bool) -> list[Step]:
    """The steps that can be done on so many channels; those of a named policy that cannot are left out."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] == 3:
        return steps
    wrong = [step for step in steps if isinstance(step, Operation) and step.rgb_only]
    if wrong and not named:
        raise ValueError(
            f"{type(wrong[0]).__name__} is for RGB images, but these have {images.shape[1]} channels. Leave it out;"
            " Brightness and Contrast work with any number of channels."
        )
    return [step for step in steps if step not in wrong]


def _what(thing: Any) -> str:
    return f"{tuple(thing.shape)} of {thing.dtype}" if isinstance(thing, Tensor) else type(thing).__name__
