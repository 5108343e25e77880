"""Does Adam-then-SGD help? All arms on Fashion-MNIST, ResNet-8, over seeds, in one table.

    python benchmarks/optimizer/arms.py

The arms: Adam; SGD; Adam then SGD with a given rate; with the SWATS rate (``lr="auto"``); with the default plateau
trigger; and the control, Adam with its rate divided by ten at the epoch of the switch. The control tells what of the
gain is the switch and what the drop of the learning rate. Every arm divides its rate by ten after three quarters of
its 12 epochs. A longer schedule with the same four epochs of Adam, in ``arms_24_epochs.csv``:

    python benchmarks/optimizer/arms.py --epochs 24 --arms adam sgd adam_then_sgd --out .../arms_24_epochs.csv

Each finished run is appended to ``arms.csv`` and skipped the next time, so the study can be interrupted; two processes
with other ``--arms`` and OMP_NUM_THREADS=1 share the work. Under an hour on two cores. Test accuracy is that of the
last epoch, not of the best.
"""

from __future__ import annotations

import argparse
import csv
import logging
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import MultiStepLR

from lightning_tips import OptimizerSwitchCallback
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier

SWITCH, EPOCHS = 4, 12
COLUMNS = ["arm", "seed", "images", "batch", "test_acc", "val_acc", "switch_epoch", "lr", "swats_lr"]
COLUMNS += ["cpu_seconds", "epochs", "machine"]


def sgd(params: Any) -> SGD:
    return SGD(params, lr=0.1, momentum=0.9)


def adam(params: Any) -> Adam:
    return Adam(params, lr=1e-3)


# Arm: optimizer of the module, further epochs at which its rate falls, arguments of the switch.
ARMS: dict[str, tuple[Any, list[int], dict[str, Any] | None]] = {
    "adam": (adam, [], None),
    "sgd": (sgd, [], None),
    "adam_then_sgd": (adam, [], {"trigger": "epoch", "at": SWITCH}),
    "adam_then_sgd_auto_lr": (adam, [], {"trigger": "epoch", "at": SWITCH, "lr": "auto"}),
    "control_adam_decay": (adam, [SWITCH], None),
    "adam_then_sgd_plateau": (adam, [], {"trigger": "plateau"}),
    "adam_then_sgd_swats": (adam, [], {"trigger": "swats", "lr": "auto"}),
}


def run(arm: str, seed: int, data: LightningDataModule, epochs: int) -> dict[str, Any]:
    optimizer, milestones, switching = ARMS[arm]
    milestones = [*milestones, epochs * 3 // 4]
    seed_everything(seed, verbose=False)
    module = ImageClassifier(
        "resnet8", in_channels=1, optimizer=optimizer, lr_scheduler=lambda o: MultiStepLR(o, milestones, gamma=0.1)
    ).to(memory_format=torch.channels_last)
    switch = OptimizerSwitchCallback(sgd, **switching) if switching is not None else None
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[switch] if switch else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.process_time()
    trainer.fit(module, datamodule=data)
    spent = time.process_time() - started
    val_acc = float(trainer.callback_metrics["val_acc"])
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    event = switch.events[0] if switch and switch.events else None
    return {
        "arm": arm,
        "seed": seed,
        "test_acc": round(100 * tested["test_acc"], 2),
        "val_acc": round(100 * val_acc, 2),
        "switch_epoch": event.epoch if event else "",
        "lr": round(float(event.details["lr"]), 5) if event else "",
        "swats_lr": round(float(event.details["swats_lr"]), 5) if event and "swats_lr" in event.details else "",
        "cpu_seconds": round(spent, 1),
        "epochs": epochs,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }


def summary(rows: list[dict[str, Any]]) -> str:
    by_arm = {arm: {r["seed"]: float(r["test_acc"]) for r in rows if r["arm"] == arm} for arm in ARMS}
    lines = [f"{'arm':<24}{'seeds':>6}{'test %':>9}{'sd':>7}{'minus adam, paired (sd)':>27}"]
    for arm, scores in by_arm.items():
        if not scores:
            continue
        values = list(scores.values())
        paired = [score - by_arm["adam"][seed] for seed, score in scores.items() if seed in by_arm["adam"]]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        against = f"{statistics.mean(paired):+.2f}" if paired else ""
        against += f" ({statistics.stdev(paired):.2f})" if len(paired) > 1 else ""
        lines.append(f"{arm:<24}{len(values):>6}{statistics.mean(values):>9.2f}{spread:>7.2f}{against:>27}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("arms.csv"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--images", type=int, default=12_000, help="training images")
    parser.add_argument("--batch", type=int, default=128, help="batch size")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits, for a quick look")
    chosen = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")

    rows: list[dict[str, Any]] = []
    if chosen.out.exists():
        rows = list(csv.DictReader(chosen.out.read_text().splitlines()))
    done = {(row["arm"], int(row["seed"])) for row in rows}
    for seed in chosen.seeds:
        for arm in chosen.arms:
            if (arm, seed) in done:
                continue
            data: LightningDataModule
            if chosen.digits:
                data = DigitsDataModule(batch_size=chosen.batch, seed=seed)
            else:
                data = FashionMNISTDataModule(
                    batch_size=chosen.batch, train_size=chosen.images, val_fraction=0.05, seed=seed
                )
            row = run(arm, seed, data, chosen.epochs) | {"images": chosen.images, "batch": chosen.batch}
            fresh = not chosen.out.exists()
            with chosen.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if fresh:
                    writer.writeheader()
                writer.writerow(row)
            rows.append({key: str(value) for key, value in row.items()} | {"seed": seed})
            print(", ".join(f"{key} {value}" for key, value in row.items() if key != "machine"), flush=True)
    print(summary(rows))


if __name__ == "__main__":
    main()
