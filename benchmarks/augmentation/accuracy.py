"""Test accuracy with and without augmentation, short and long, on a small part of Fashion-MNIST.

    python benchmarks/augmentation/accuracy.py            five minutes on one thread
    python benchmarks/augmentation/accuracy.py --smoke    a moment, on digits

A small convolutional network, SGD with momentum and one cycle; test accuracy of the last epoch, no selection. Seeds are
paired: the arms of a seed share the training images, the initial weights and the order. The time of training alone is
process CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tips.augmentation import augment_batch, mix_batch
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule

SHIFT = [{"Shift": {"by": 0.125}}]
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "shift": {"policy": SHIFT},
    "light": {"policy": "light"},
    "standard": {"policy": "standard"},
    "light, mixup 0.2": {"policy": "light", "mixup": 0.2},
    "light, CutMix 1": {"policy": "light", "cutmix": 1.0},
}


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(4),
        nn.Flatten(),
        nn.Linear(768, 10),
    )


def tensors(dataset: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(dataset[n] for n in range(len(dataset))), strict=True)
    return torch.stack(images), torch.as_tensor(labels)


def train(
    data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], epochs: int, seed: int, arm: dict[str, Any]
) -> tuple[float, float]:
    """The test accuracy in percent, and the CPU seconds of training."""
    torch.manual_seed(seed)
    model = network()
    images, labels = data
    steps = len(images) // 64
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    started = time.process_time()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            chosen = order[step * 64 : (step + 1) * 64]
            batch, targets = images[chosen], labels[chosen]
            if "policy" in arm:
                address = ((seed * 1009 + epoch) * 1_000_003) + chosen  # seed, epoch, sample
                batch = augment_batch(batch, arm["policy"], address)
            if "mixup" in arm or "cutmix" in arm:
                number = (seed * 1009 + epoch) * 100_003 + step
                batch, targets = mix_batch(batch, targets, 10, arm.get("mixup", 0), arm.get("cutmix", 0), number)
            loss = F.cross_entropy(model(batch), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.process_time() - started
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(test[0].split(500), test[1].split(500), strict=True)
        )
    return 100 * right / len(test[1]), seconds


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("accuracy.json"))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--epochs", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--smoke", action="store_true", help="digits, one epoch, two arms")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    arms = {name: ARMS[name] for name in dict.fromkeys(["none", *chosen.arms])}
    if chosen.smoke:
        chosen.images, chosen.epochs, chosen.seeds, arms = 128, [1], [0], {k: ARMS[k] for k in ("none", "standard")}
    module = DigitsDataModule() if chosen.smoke else FashionMNISTDataModule()
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    whole: Any = module.train_dataloader().dataset
    test = tensors(module.test_dataloader().dataset)
    result: dict[str, Any] = {"data": type(module).__name__, "images": chosen.images, "seeds": chosen.seeds}
    for epochs in chosen.epochs:
        rows: dict[str, Any] = {}
        found: dict[str, list[float]] = {name: [] for name in arms}
        times: dict[str, list[float]] = {name: [] for name in arms}
        for seed in chosen.seeds:
            part = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[: chosen.images]
            data = tensors(torch.utils.data.Subset(whole, part.tolist()))
            for name, arm in arms.items():
                accuracy, seconds = train(data, test, epochs, seed, arm)
                found[name].append(accuracy)
                times[name].append(seconds)
                print(epochs, seed, name, f"{accuracy:.2f}", f"{seconds:.1f} s", flush=True)
        for name, values in found.items():
            minus = [a - b for a, b in zip(values, found["none"], strict=True)]
            rows[name] = {"test": [round(v, 2) for v in values], "mean": round(statistics.mean(values), 2)}
            rows[name] |= {"minus_none": round(statistics.mean(minus), 2)}
            if len(values) > 1:
                rows[name] |= {
                    "sd": round(statistics.stdev(values), 2),
                    "minus_none_sd": round(statistics.stdev(minus), 2),
                }
            steps = epochs * (chosen.images // 64)
            rows[name]["ms_a_step"] = round(1000 * statistics.median(times[name]) / steps, 2)
        result[f"{epochs} epochs"] = rows
        chosen.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
