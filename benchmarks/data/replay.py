"""What does replay cost and save? Two new classes learned by a model of eight, with none to half of each batch old.

    python benchmarks/data/replay.py

Fashion-MNIST. A small network (two convolutions with dropout) learns the classes 0 to 7 from 300 images each (600
steps). Its weights go into a module of ten classes (`load_with_new_classes`), which learns the classes 8 and 9 from 300
images each, 200 steps of 64 images in each arm, with a `ReplayCallback`:

* ``share_0``: new images alone
* ``share_0.25``, ``share_0.5``: so much of each batch from the 2,400 old images
* ``share_0.5_memory_80``: from ten of each old class, all that was kept

The scores are the callback's own, before the first step and after the last one, by the module's validation on the test
images: 8,000 old and 2,000 new ones. Each finished run is appended to ``replay.csv`` and skipped the next time.
``--smoke`` takes scikit-learn's digits and a few steps.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import logging
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_tips import ReplayCallback
from lightning_tips.transfer import load_with_new_classes
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier

COLUMNS = [
    *("arm", "seed", "old_before", "old_after", "new_before", "new_after", "mean_after"),
    *("steps", "cpu_seconds", "machine"),
]
BATCH, OLD = 64, 8
ARMS: dict[str, dict[str, Any]] = {
    "share_0": {"share": 0.0},
    "share_0.25": {"share": 0.25},
    "share_0.5": {"share": 0.5},
    "share_0.5_memory_80": {"share": 0.5, "memory": 80},
}


def beside(name: str) -> Any:
    """Another benchmark of this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def data(options: argparse.Namespace, classes: range, seed: int) -> Any:
    """Images of some classes, validated on the test images."""
    kind: Any = DigitsDataModule if options.smoke else FashionMNISTDataModule
    made = kind(batch_size=BATCH, class_counts=dict.fromkeys(classes, options.images), seed=seed)
    made.setup("fit")
    made.setup("test")
    made.val_dataloader = made.test_dataloader
    return made


def make(options: argparse.Namespace, classes: int, seed: int) -> ImageClassifier:
    seed_everything(seed, verbose=False)
    module = ImageClassifier("resnet8", num_classes=classes, in_channels=1)
    network = beside("pseudo_labels").small_network(8 if options.smoke else 28)
    network[-1] = torch.nn.Linear(network[-1].in_features, classes)
    module.network = network
    return module


def train(module: ImageClassifier, tips: list[Callback], of: Any, steps: int, options: argparse.Namespace) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        callbacks=tips,
        logger=False,
        check_val_every_n_epoch=10_000,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=options.folder,
    )
    trainer.fit(module, datamodule=of)
    return trainer


def run_seed(seed: int, arms: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    old, new = data(options, range(OLD), seed), data(options, range(OLD, 10), seed)
    trained = make(options, OLD, seed)
    train(trained, [], old, options.base_steps, options)
    rows = []
    for arm in arms:
        module = make(options, 10, seed)
        load_with_new_classes(module, trained.state_dict())
        replay = ReplayCallback(old.train_set, old_validation=old.test_set, seed=seed, **ARMS[arm])
        started = time.process_time()
        trainer = train(module, [replay], new, options.steps, options)
        seconds = time.process_time() - started
        assert replay.before is not None
        assert replay.after is not None
        scores = [100 * s[k]["val_acc"] for k in ("old", "new") for s in (replay.before, replay.after)]
        row = dict(zip(COLUMNS[2:6], (round(score, 2) for score in scores), strict=True))
        mean = round((OLD * scores[1] + (10 - OLD) * scores[3]) / 10, 2)  # as if all were tested together
        rows.append(
            {"arm": arm, "seed": seed, **row, "mean_after": mean, "steps": trainer.global_step}
            | {"cpu_seconds": round(seconds, 1), "machine": f"{platform.machine()}, torch {torch.__version__}"}
        )
        print(rows[-1], flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    lines = [f"arm: {', '.join(COLUMNS[2:7])} (sd), seeds"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        cells = []
        for column in COLUMNS[2:7]:
            values = [float(row[column]) for row in mine]
            cells.append(f"{statistics.mean(values):.1f} ({statistics.stdev(values) if len(values) > 1 else 0:.1f})")
        lines.append(f"{arm}: {', '.join(cells)}, {len(mine)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("replay.csv"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=300, help="of each class")
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("runs/replay"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.images, options.base_steps, options.steps = 40, 30, 12
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*smaller than the logging interval.*")
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        with options.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["arm"], int(row["seed"])) for row in rows}
    for seed in options.seeds:
        arms = [arm for arm in options.arms if (arm, seed) not in done]
        if not arms:
            continue
        rows += run_seed(seed, arms, options)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    print(summary(rows))
    return rows


if __name__ == "__main__":
    main()
