"""What do pseudo-labels bring at 500 labels? The same steps with and without them, over seeds.

    python benchmarks/data/pseudo_labels.py

Fashion-MNIST: 500 labelled images, and 9,500 others of the training part without their labels. Two convolutions with
dropout (the best network for so few labels, see the transfer card), Adam with 1e-3 falling as a cosine to 0, 800
steps of 32 images for each arm, labels renewed every 200 steps, tested on all 10,000 images. The arms:

* ``supervised``: the labelled images alone (`PseudoLabelCallback` is there and never begins, so the arms share the
  order of samples and the length of epochs)
* ``pseudo_labels``: half of each batch labelled by the network itself from step 200 on, at a confidence of
  0.9 or more, balanced as the labelled images are
* ``more``: three quarters of each batch, at 0.8; ``surer``: at 0.95
* ``ensemble_teacher``: labelled once, at step 200, by three networks that were trained on the labelled images alone
  from other initial weights (their training comes on top), at 0.5, three quarters of each batch
* ``augmented``, ``augmented_pseudo_labels``: the first two with flips and shifts of `BatchAugmentationCallback`
* ``hurt``: a teacher that knows nothing (an untrained network) and no threshold: what the guard is for
* ``all_labels``: all 10,000 with their labels, the most that there is to be had

The guard compares with validation on 500 further images. ``right`` is the share of right ones in the last round's
pseudo-labels. Each finished run is appended to ``pseudo_labels.csv`` and skipped the next time. ``--smoke`` takes
scikit-learn's digits and a few steps.
"""

from __future__ import annotations

import argparse
import csv
import logging
import platform
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_tips import BatchAugmentationCallback, PseudoLabelCallback
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier, ImageDataModule

COLUMNS = ["arm", "seed", "test_acc", "accepted", "right", "given_up", "steps", "cpu_seconds", "machine"]
BATCH = 32

ARMS: dict[str, dict[str, Any]] = {
    "supervised": {"start_epoch": 10_000},
    "pseudo_labels": {},
    "more": {"share": 0.75, "threshold": 0.8},
    "surer": {"threshold": 0.95},
    "ensemble_teacher": {"share": 0.75, "threshold": 0.5, "every_n_epochs": 10_000},
    "augmented": {"start_epoch": 10_000},
    "augmented_pseudo_labels": {},
    "hurt": {"threshold": 0.0, "patience": 1},
    "all_labels": {"start_epoch": 10_000},
}


def small_network(side: int) -> nn.Sequential:
    """Two convolutions, and no pooling over the whole image: where things are matters in clothes."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(32 * (side // 4) ** 2, 10)),
    )


def classifier(side: int, steps: int, seed: int) -> ImageClassifier:
    seed_everything(seed, verbose=False)
    module = ImageClassifier(
        "resnet8",
        in_channels=1,
        lr_scheduler=partial(CosineAnnealingLR, T_max=steps),
        lr_scheduler_interval="step",
    )
    module.network = small_network(side)
    return module


def without(whole: ImageDataModule, labelled: ImageDataModule) -> Any:
    """The images of one training part that are not in the other."""
    for data in (whole, labelled):
        data.setup("fit")
    assert whole.train_set is not None
    assert labelled.train_set is not None
    apart = ~torch.isin(whole.train_set.indices, labelled.train_set.indices)
    return whole.train_set.subset(torch.nonzero(apart).flatten())


def train(
    module: ImageClassifier, tips: list[Callback], data: Any, epochs: int, options: argparse.Namespace
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_val_batches=-(-500 // BATCH),
        num_sanity_val_steps=1,
        callbacks=tips,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=options.folder,
    )
    trainer.fit(module, datamodule=data)
    return trainer


class Mean(nn.Module):
    """The mean probabilities of several networks."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images).softmax(1) for member in self.members]).mean(0)


def run(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    epochs = options.steps // options.steps_an_epoch
    kind: Any = DigitsDataModule if options.smoke else FashionMNISTDataModule
    side = 8 if options.smoke else 28
    total = options.labels + options.unlabelled
    whole = kind(batch_size=BATCH, train_size=total, seed=seed)
    labelled = kind(batch_size=BATCH, train_size=options.labels, seed=seed)
    unlabelled = without(whole, labelled)
    arguments: dict[str, Any] = {
        "start_epoch": max(1, epochs // 3),
        "share": 0.5,
        "threshold": 0.9,
        "max_drop": 0.02,
        "audit": True,
        "epoch_size": options.steps_an_epoch * BATCH,
        "seed": seed,
    } | ARMS[arm]
    if arm == "hurt":
        arguments |= {"teacher": classifier(side, 1, seed + 1000)}
    started = time.process_time()
    if arm == "ensemble_teacher":
        members: list[nn.Module] = []
        for number in range(3):
            member = classifier(side, epochs * options.steps_an_epoch, 100 * (number + 1) + seed)
            idle = PseudoLabelCallback(unlabelled, **arguments | {"start_epoch": 10_000})
            train(member, [idle], labelled, epochs, options)
            members.append(member)
        arguments |= {"teacher": Mean(members)}
    tip = PseudoLabelCallback(unlabelled, **arguments)
    tips: list[Callback] = [tip]
    if arm.startswith("augmented"):
        tips.append(BatchAugmentationCallback("light", preview=False))
    module = classifier(side, epochs * options.steps_an_epoch, seed)
    trainer = train(module, tips, whole if arm == "all_labels" else labelled, epochs, options)
    seconds = time.process_time() - started
    (tested,) = trainer.test(module, datamodule=labelled, verbose=False)
    rounds = [event for event in tip.events if "round" in event.what]
    last = rounds[-1].details if rounds else {}
    return {
        "arm": arm,
        "seed": seed,
        "test_acc": round(100 * float(tested["test_acc"]), 2),
        "accepted": last.get("accepted", ""),
        "right": round(100 * float(last["right"]), 1) if "right" in last else "",
        "given_up": next((event.epoch for event in tip.events if "given up" in event.what), ""),
        "steps": trainer.global_step,
        "cpu_seconds": round(seconds, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """Mean, standard deviation, and the paired difference from its own control."""
    of = {(row["arm"], int(row["seed"])): float(row["test_acc"]) for row in rows}
    lines = ["arm: test % (sd), minus control paired (sd), seeds"]
    for arm in ARMS:
        seeds = sorted(seed for name, seed in of if name == arm)
        if not seeds:
            continue
        control = "augmented" if arm == "augmented_pseudo_labels" else "supervised"
        pairs = [of[arm, seed] - of[control, seed] for seed in seeds if (control, seed) in of]
        values = [of[arm, seed] for seed in seeds]
        cells = [
            f"{statistics.mean(found):+.2f} ({statistics.stdev(found) if len(found) > 1 else 0:.2f})" if found else "-"
            for found in (values, pairs)
        ]
        lines.append(f"{arm}: {cells[0].lstrip('+')}, {cells[1]}, {len(seeds)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("pseudo_labels.csv"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--labels", type=int, default=500)
    parser.add_argument("--unlabelled", type=int, default=9500)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--steps-an-epoch", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("runs/pseudo_labels"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.labels, options.unlabelled, options.steps, options.steps_an_epoch = 100, 400, 30, 5
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*unlabelled samples reach the threshold.*|.*of the pseudo-labels are of.*")
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        with options.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["arm"], int(row["seed"])) for row in rows}
    for seed in options.seeds:
        for arm in options.arms:
            if (arm, seed) in done:
                continue
            rows.append(run(arm, seed, options))
            print(rows[-1], flush=True)
            with options.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
    print(summary(rows))
    return rows


if __name__ == "__main__":
    main()
