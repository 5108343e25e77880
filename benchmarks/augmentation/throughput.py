"""Images a second through one chain of augmentations: ours, torchvision v2, and kornia where it is installed.

    python benchmarks/augmentation/throughput.py            two minutes
    python benchmarks/augmentation/throughput.py --smoke    a moment

Process CPU time, one thread, medians over rounds in which the candidates take turns, so that a busy machine slows all
alike. The chain: both flips, rotation up to 15 degrees, brightness, contrast and saturation 0.2, hue 0.05, a blur of 3
taps, a crop after padding by 8; on 3x64x64 uint8. The second chain is flip and crop alone. Last, what the callback adds
to the training step of a ResNet-8 on the same images.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import InterpolationMode, v2

from lightning_tips import BatchAugmentationCallback
from lightning_tips.augmentation import (
    Blur,
    Brightness,
    Contrast,
    HorizontalFlip,
    Hue,
    Rotate,
    Saturation,
    Shift,
    VerticalFlip,
    augment_batch,
)
from lightning_tips.vision import ImageClassifier

SIDE = 64
FLIP_AND_CROP = [HorizontalFlip(), Shift(8)]
CHAIN = [
    HorizontalFlip(),
    VerticalFlip(),
    Rotate(15),
    Brightness(0.2),
    Contrast(0.2),
    Saturation(0.2),
    Hue(0.05),
    Blur((0.1, 2.0), size=3),
    Shift(8),
]


def candidates() -> dict[str, dict[str, Callable[[Tensor], Any]]]:
    """For each chain what does it: a name and a function of a batch."""
    crop = v2.RandomCrop(SIDE, padding=8)
    flip_and_crop = v2.Compose([v2.RandomHorizontalFlip(), crop])
    chain = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.RandomRotation(15, InterpolationMode.BILINEAR),
            v2.ColorJitter(0.2, 0.2, 0.2, 0.05),
            v2.GaussianBlur(3, (0.1, 2.0)),
            crop,
        ]
    )
    found: dict[str, dict[str, Callable[[Tensor], Any]]] = {
        "chain": {
            "augment_batch": lambda images: augment_batch(images, CHAIN, torch.arange(len(images))),
            "torchvision v2, per sample": lambda images: torch.stack([chain(image) for image in images]),
            "torchvision v2, on a batch": chain,
        },
        "flip and crop": {
            "augment_batch": lambda images: augment_batch(images, FLIP_AND_CROP, torch.arange(len(images))),
            "torchvision v2, per sample": lambda images: torch.stack([flip_and_crop(image) for image in images]),
        },
    }
    try:
        import kornia.augmentation as K  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return found
    stages = torch.nn.Sequential(
        K.RandomHorizontalFlip(),
        K.RandomVerticalFlip(),
        K.RandomRotation(15.0, p=1.0),
        K.ColorJitter(0.2, 0.2, 0.2, 0.05, p=1.0),
        K.RandomGaussianBlur((3, 3), (0.1, 2.0), p=1.0),
        K.RandomCrop((SIDE, SIDE), padding=8, p=1.0),
    )
    found["chain"]["kornia"] = lambda images: (stages(images.float() / 255) * 255).round().to(torch.uint8)
    return found


def cpu_seconds(what: Callable[[Tensor], Any], images: Tensor) -> float:
    start = time.process_time()
    what(images)
    return time.process_time() - start


def measure(functions: dict[str, Callable[[Tensor], Any]], images: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function(images[:32])  # what is done once only
    for _ in range(rounds):
        for name, function in functions.items():
            taken[name].append(cpu_seconds(function, images))
    ours = taken["augment_batch"]
    result = {}
    for name, times in taken.items():
        ratios = [a / b for a, b in zip(times, ours, strict=True)]
        result[name] = {
            "images_a_cpu_second": round(len(images) / statistics.median(times)),
            "ours_times_faster": float(f"{statistics.median(ratios):.3g}"),
            "lowest_of_rounds": float(f"{min(ratios):.3g}"),
            "highest_of_rounds": float(f"{max(ratios):.3g}"),
        }
    return result


class Clock(Callback):
    """Process CPU time of each training step, the augmentation within."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self.started)


def steps(images: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of a step of 64 images, without the callback and with each policy, in turns."""
    data = TensorDataset(images.float() / 255, torch.arange(len(images)) % 10)
    taken: dict[str, list[float]] = {name: [] for name in ("without", "light", "standard", "strong")}
    for _ in range(rounds):
        for policy, seconds in taken.items():
            torch.manual_seed(0)
            clock = Clock()
            tips = [] if policy == "without" else [BatchAugmentationCallback(policy, preview=False)]
            trainer = Trainer(
                accelerator="cpu",
                max_epochs=1,
                callbacks=[*tips, clock],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(ImageClassifier("resnet8"), DataLoader(data, 64))
            seconds += clock.seconds[1:]  # the first one looks at the values, and allocates
    return {name: round(1000 * statistics.median(seconds), 2) for name, seconds in taken.items()}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("throughput.json"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", action="store_true", help="the training step only, into the file that is there")
    parser.add_argument("--smoke", action="store_true", help="32 images, 2 rounds")
    chosen = parser.parse_args(arguments)
    if chosen.smoke:
        chosen.rounds, chosen.images = 2, 32
    torch.set_num_threads(1)
    torch.manual_seed(0)
    noise = torch.rand(chosen.images, 3, 16, 16)
    images = (F.interpolate(noise, SIDE, mode="bilinear") * 255).to(torch.uint8)
    equal = images[:1].expand(256, -1, -1, -1).contiguous()

    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}, torchvision {torchvision.__version__}",
        "images": f"{chosen.images} of 3x{SIDE}x{SIDE} uint8",
        "rounds": chosen.rounds,
        "distinct_of_256_equal": {},
    }
    if chosen.steps:
        result = json.loads(chosen.out.read_text())
    chains = {} if chosen.steps else candidates()
    for name, functions in chains.items():
        result[name] = measure(functions, images, chosen.rounds)
        print(name, json.dumps(result[name], indent=2), flush=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")
    many = images.repeat(-(-256 // len(images)), 1, 1, 1)[: 128 if chosen.smoke else 256]
    result["torch_of_steps"] = torch.__version__
    result["ms_a_step_of_64"] = steps(many, 1 if chosen.smoke else 5)
    print(json.dumps(result["ms_a_step_of_64"], indent=2))
    for name, function in chains.get("chain", {}).items():
        result["distinct_of_256_equal"][name] = len(function(equal).flatten(1).unique(dim=0))
    if "kornia" in chains.get("chain", {}):
        import kornia  # type: ignore[import-not-found,unused-ignore]

        result["kornia"] = kornia.__version__
    print(json.dumps(result["distinct_of_256_equal"], indent=2))
    chosen.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
