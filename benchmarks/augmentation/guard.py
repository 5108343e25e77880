"""What the label guard says of clothes: a network that saw Fashion-MNIST as it is, asked about each operation.

    python benchmarks/augmentation/guard.py            two minutes on one thread
    python benchmarks/augmentation/guard.py --smoke    a moment, on digits

The network is trained twice: on the images as they are, and with flips and shifts, which shows how far the guard
confuses what a network has never seen with what changes the content.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tips.augmentation import (
    Brightness,
    HorizontalFlip,
    Rotate,
    Shift,
    VerticalFlip,
    augment_batch,
    guard_table,
    label_guard,
)
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule

OPERATIONS = [Shift(1), HorizontalFlip(), VerticalFlip(), Rotate(15), Rotate((180, 180)), Brightness(0.3)]
SEEN = {"as they are": [], "with flips and shifts": [HorizontalFlip(), Shift(2)]}
COLUMNS = ("trained", "operation", "class", "samples", "accuracy", "augmented", "taken_for", "verdict")


def trained(images: Tensor, labels: Tensor, policy: list[Any], epochs: int) -> nn.Module:
    torch.manual_seed(0)
    side = images.shape[-1] // 4
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * side**2, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for epoch in range(epochs):
        for chosen in torch.randperm(len(images)).split(64):
            batch = augment_batch(images[chosen], policy, epoch * 1_000_003 + chosen) if policy else images[chosen]
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels[chosen]).backward()
            optimizer.step()
    return model


def tensors(dataset: Any, most: int) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(dataset[n] for n in range(min(most, len(dataset)))), strict=True)
    return torch.stack(images), torch.stack(labels)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("guard.csv"))
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--smoke", action="store_true", help="digits")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    source = DigitsDataModule(val_fraction=0.4) if chosen.smoke else FashionMNISTDataModule()
    source.prepare_data()
    source.setup("fit")
    images, labels = tensors(source.train_set, chosen.images)
    held_out = tensors(source.val_set, 5000)
    names = list(source.label_names)
    found: list[dict[str, Any]] = []
    for name, policy in SEEN.items():
        rows = label_guard(trained(images, labels, policy, chosen.epochs), *held_out, OPERATIONS)
        print(f"Trained on images {name}:")
        print(guard_table(rows, names), flush=True)
        for row in rows:
            taken = names[row.taken_for] if row.taken_for >= 0 else ""
            values = (name, row.operation, names[row.label], row.samples, round(row.clean_accuracy, 3))
            found.append(dict(zip(COLUMNS, (*values, round(row.accuracy, 3), taken, row.verdict), strict=True)))
    with chosen.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(found)
    return found


if __name__ == "__main__":
    main()
