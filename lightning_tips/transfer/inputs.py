"""Whether a network gets images as its weights were trained on: a wrong normalisation fails without a word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# How people scale images; what a wrong one is called in the warning.
_CUSTOMS = {
    "values from 0 to 1 that are not normalised": ((0.0,), (1.0,)),
    "values from 0 to 255": ((0.0,), (1 / 255,)),
    "mean 0.5 and std 0.5": ((0.5,), (0.5,)),
    "ImageNet's mean and std": _IMAGENET,
}


@dataclass(frozen=True)
class InputExpectation:
    """What a network's weights were trained on.

    Attributes:
        mean: Of each channel, for images in [0, 1].
        std: Likewise.
        size: Height and width.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]


def expected_inputs(network: nn.Module) -> InputExpectation | None:
    """What is known of a network's weights: timm says so itself, torchvision's are trained alike; else ``None``."""
    config = getattr(network, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("mean") and config.get("input_size"):
        mean, std = (tuple(float(v) for v in config[key]) for key in ("mean", "std"))
        return InputExpectation(mean, std, (int(config["input_size"][1]), int(config["input_size"][2])))
    if type(network).__module__.startswith("torchvision.models"):
        return InputExpectation(*_IMAGENET, (224, 224))
    return None


def check_images(images: Tensor, expected: InputExpectation) -> list[str]:
    """What is wrong with a batch of images, as far as its range and size tell.

    Args:
        images: (B, C, H, W), as the network gets them.
        expected: What it should get.

    Returns:
        A sentence for each finding; none for other inputs than images.

    Example:
        >>> import torch
        >>> imagenet = InputExpectation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 224))
        >>> check_images(torch.rand(4, 3, 224, 224), imagenet)[0][:50]
        'The images look like values from 0 to 1 that are n'
    """
    if images.ndim != 4 or not images.is_floating_point():
        return []
    found = []
    low, high = float(images.min()), float(images.max())
    bounds = _bounds(expected.mean, expected.std)
    distance = _distance((low, high), bounds)
    # Augmentation and photos without black or white move the ends; what is far off is told, and what it looks like.
    nearest = min(_CUSTOMS, key=lambda name: _distance((low, high), _bounds(*_CUSTOMS[name])))
    other = _bounds(*_CUSTOMS[nearest])
    if distance > 0.2 and (_distance((low, high), other) < distance / 2 and _distance(bounds, other) > 0.1):
        what = f"look like {nearest}"
    elif low < bounds[0] - 0.5 * (bounds[1] - bounds[0]) or high > bounds[1] + 0.5 * (bounds[1] - bounds[0]):
        what = "are scaled otherwise"
    else:
        what = ""
    if what:
        found.append(
            f"The images {what}: they go from {low:.3g} to {high:.3g}, but the weights were trained with mean"
            f" {_numbers(expected.mean)} and std {_numbers(expected.std)}, which gives {bounds[0]:.3g} to"
            f" {bounds[1]:.3g}. Normalise them so."
        )
    size = (int(images.shape[-2]), int(images.shape[-1]))
    if min(size) * 3 < min(expected.size):
        found.append(
            f"The images are {size[0]}x{size[1]}, and the weights were trained on {expected.size[0]}x"
            f"{expected.size[1]}: objects of another size are other objects to them. Resize the images towards that."
        )
    return found


def watch_images(module: nn.Module, asker: str) -> list[RemovableHandle]:
    """Warns of what is wrong with the next batch of images that gets to a network whose expectations are known.

    The network may be the module or any part of it, such as a backbone beside a head of one's own.

    Args:
        module: What holds the network.
        asker: Who warns.

    Returns:
        Hooks, to be removed after the first training batch, as not each of them need have seen images.
    """
    looked = False

    def look(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal looked
        images = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        expected = expected_inputs(part)
        # A block of torchvision's inside of somebody else's network is called with features, which have more channels.
        if looked or images is None or expected is None or images.ndim != 4:
            return
        if images.shape[1] > 4 and not _is_timm(part):
            return
        looked = True
        for finding in check_images(images, expected):
            rank_zero_warn(f"{asker}: {finding} (check_inputs=False for silence)")

    parts = {id(part): part for part in _outermost_known(module)}  # one may be there under two names
    return [part.register_forward_pre_hook(look, with_kwargs=True) for part in parts.values()]


def _outermost_known(module: nn.Module) -> list[nn.Module]:
    """The largest parts whose expectations are known."""
    if expected_inputs(module) is not None:
        return [module]
    return [part for child in module.children() for part in _outermost_known(child)]


def _is_timm(module: nn.Module) -> bool:
    return isinstance(getattr(module, "pretrained_cfg", None), dict)


def _bounds(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[float, float]:
    """Black and white after normalisation, over all channels."""
    return min(-m / s for m, s in zip(mean, std, strict=True)), max((1 - m) / s for m, s in zip(mean, std, strict=True))


def _distance(ends: tuple[float, float], bounds: tuple[float, float]) -> float:
    """How far the ends of a range are from where they should be, as a share of its width."""
    width = bounds[1] - bounds[0]
    return (abs(ends[0] - bounds[0]) + abs(ends[1] - bounds[1])) / width


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in dict.fromkeys(values))
