"""A rare class and five networks, each on all of its images and on another part of the others: do they beat one?

    python benchmarks/ensemble/weapon.py

The data of ``benchmarks/imbalance/accuracy.py``: Fashion-MNIST, 50 shirts against 1,000 T-shirts, pullovers, dresses
and coats; 400 steps of 64 images for each network, ResNet-8 of width 8, Adam with 3e-3 falling as a cosine to 0; tested
on 1,000 shirts and 4,000 others. ``balanced_acc`` is the mean of the two classes' recalls, in percent.

Arms: ``plain``, all members see all images, in another order each; ``ratio_1``, ``ratio_5``: each member sees the 50
shirts and 50, or 250, of the others (``member_data="majority_subsets"``); ``one_part``, all see the 50 and the same 50
others. For each: ``single``, the mean over the members, with their lowest and highest; the votes ``soft`` and ``hard``;
``best``, weights as chosen by default on a validation split of 50 and 1,000. ``ones`` is ``single`` with the threshold
that is best on that split, ``tuned`` the soft vote with its own.

Each finished run is a line of ``weapon.csv`` and is skipped the next time. About 2 minutes a run on one core.
``--smoke`` takes scikit-learn's digits and a few steps.
"""

from __future__ import annotations

import argparse
import csv
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from lightning_tips import EnsembleModule
from lightning_tips.ensemble import ensemble_weights, vote
from lightning_tips.ensemble.data import majority_subset
from lightning_tips.imbalance import best_threshold
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier, ImageDataset

ARMS = ("plain", "ratio_1", "ratio_5", "one_part")
COLUMNS = ["arm", "seed", "single", "lowest", "highest", "soft", "hard", "best", "ones", "tuned", "members", "steps"]
COLUMNS += ["images", "cpu_seconds", "machine"]


@dataclass
class Size:
    """Of the story: Fashion-MNIST's, or the small one of the digits."""

    data: Callable[..., Any]
    steps: int
    members: int
    rare_class: int
    other_classes: tuple[int, ...]
    rare: int
    others: int


FASHION = Size(FashionMNISTDataModule, 400, 5, 6, (0, 2, 3, 4), 50, 1000)
DIGITS = Size(DigitsDataModule, 4, 2, 8, (1, 3, 5, 9), 5, 100)


def choose(data: ImageDataset, counts: dict[int, int], seed: int, rare: int) -> ImageDataset:
    """So many random images of each class; the rare one is 1, the others are 0."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, count in counts.items():
        here = torch.nonzero(data.targets == label).flatten()
        chosen.append(here[torch.randperm(len(here), generator=generator)[:count]])
    subset = data.subset(torch.cat(chosen))
    return ImageDataset(subset.images, (subset.labels == rare).long(), subset.indices, subset.scale)


def member(steps: int) -> LightningModule:
    module = ImageClassifier(
        "resnet8",
        num_classes=2,
        in_channels=1,
        network_args={"width": 8},
        optimizer=lambda params: Adam(params, lr=3e-3),
        lr_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, steps),
        lr_scheduler_interval="step",
    )
    return module.to(memory_format=torch.channels_last)


@torch.no_grad()
def predict(ensemble: EnsembleModule, data: ImageDataset) -> Tensor:
    """(M, N, 2) probabilities."""
    ensemble.eval()
    parts = [
        torch.stack([m(images).softmax(1) for m in ensemble.members]) for images, _ in DataLoader(data, batch_size=500)
    ]
    return torch.cat(parts, 1)


def balanced(flagged: Tensor, truth: Tensor) -> float:
    return 50 * float(flagged[truth == 1].float().mean() + (~flagged[truth == 0]).float().mean())


def run(arm: str, seed: int, size: Size, steps: int, members: int) -> dict[str, Any]:
    source = size.data(seed=seed, val_fraction=0.3)
    source.setup()
    counts = {size.rare_class: size.rare} | {c: size.others // len(size.other_classes) for c in size.other_classes}
    data = choose(source.train_set, counts, seed, size.rare_class)
    val = choose(source.val_set, counts, seed, size.rare_class)
    everything = dict.fromkeys(counts, len(source.test_set))
    test = choose(source.test_set, everything, seed, size.rare_class)
    kind, ratio = "own_order", 1.0
    if arm == "one_part":
        data = data.subset(torch.from_numpy(majority_subset(data.targets, seed, 0)))
    elif arm.startswith("ratio"):
        kind, ratio = "majority_subsets", float(arm.removeprefix("ratio_"))
    seed_everything(seed, verbose=False)
    ensemble = EnsembleModule(
        member=partial(member, steps),
        n=members,
        member_data=kind,  # type: ignore[arg-type]
        majority_ratio=ratio,
        seed=100 * seed,
        voting="soft",
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.process_time()
    trainer.fit(ensemble, DataLoader(data, 64, shuffle=True))
    spent = time.process_time() - started
    assert trainer.global_step == steps

    found, truth = predict(ensemble, test), test.targets
    held = predict(ensemble, val)
    singles = [balanced(one.argmax(1) == 1, truth) for one in found]
    tuned = [
        balanced(one[:, 1] >= best_threshold(other[:, 1], val.targets).value, truth)
        for one, other in [*zip(found, held, strict=True), (found.mean(0), held.mean(0))]
    ]
    scores = {
        "single": statistics.mean(singles),
        "lowest": min(singles),
        "highest": max(singles),
        "soft": balanced(vote(found).prediction == 1, truth),
        "hard": balanced(vote(found, voting="hard").prediction == 1, truth),
        "best": balanced(vote(found, ensemble_weights(held, val.targets)).prediction == 1, truth),
        "ones": statistics.mean(tuned[:-1]),
        "tuned": tuned[-1],
    }
    return {name: round(value, 3) for name, value in scores.items()} | {
        "members": members,
        "steps": steps,
        "images": len(data) if not arm.startswith("ratio") else len(majority_subset(data.targets, 0, 0, ratio)),
        "cpu_seconds": round(spent, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }


def summary(path: Path) -> list[str]:
    """A line for each arm: means over seeds, with standard deviations."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        parts = []
        for name in ("single", "soft", "hard", "best", "ones", "tuned"):
            values = [float(row[name]) for row in mine]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            parts.append(f"{name} {statistics.mean(values):.2f} ({spread:.2f})")
        lines.append(f"{arm}, {len(mine)} seeds: " + ", ".join(parts))
    return lines


def main(arguments: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--members", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("weapon.csv"))
    parser.add_argument("--smoke", action="store_true", help="digits and a few steps")
    chosen = parser.parse_args(arguments)
    size = DIGITS if chosen.smoke else FASHION
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    done: set[tuple[str, int]] = set()
    if chosen.out.exists():
        with chosen.out.open(newline="") as file:
            done = {(row["arm"], int(row["seed"])) for row in csv.DictReader(file)}
    for seed in chosen.seeds:
        for arm in chosen.arms:
            if (arm, seed) in done:
                continue
            found = run(arm, seed, size, chosen.steps or size.steps, chosen.members or size.members)
            new = not chosen.out.exists()
            with chosen.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow({"arm": arm, "seed": seed} | found)
            print(arm, seed, {k: found[k] for k in ("single", "soft", "cpu_seconds")}, flush=True)
    lines = summary(chosen.out)
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main()
