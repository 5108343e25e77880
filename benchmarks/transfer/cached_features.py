"""What `cache_features` saves: the head of EfficientNet-Lite0 on 480 images, with it and without, in turns.

    python benchmarks/transfer/cached_features.py

Weights are random: they make no difference to the time, nor to whether the results are the same. Process CPU time of
each epoch, one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_tips import TransferLearningCallback
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier


class Clock(Callback):
    """Process CPU seconds of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(time.process_time() - self._start)


def run(cached: bool, options: argparse.Namespace) -> tuple[list[float], dict[str, torch.Tensor]]:
    seed_everything(0, verbose=False)
    name = "timm/test_efficientnet" if options.smoke else "timm/tf_efficientnet_lite0"
    module = ImageClassifier(name, in_channels=1)
    kind: Any = DigitsDataModule if options.smoke else FashionMNISTDataModule
    data = kind(batch_size=32, train_size=64 if options.smoke else 480, image_size=options.size)
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        limit_val_batches=0,
        callbacks=[TransferLearningCallback("head_only", cache_features=cached, check_inputs=False), clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return clock.epochs, {name: value.clone() for name, value in module.state_dict().items()}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="a small network on few digits")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    torch.set_num_threads(1)
    first: dict[str, list[float]] = {"without": [], "with": []}
    later: dict[str, list[float]] = {"without": [], "with": []}
    difference = 0.0
    for _ in range(options.rounds):
        ends = []
        for arm in first:
            epochs, end = run(arm == "with", options)
            first[arm].append(round(epochs[0], 4))
            later[arm] += [round(seconds, 4) for seconds in epochs[1:]]
            ends.append(end)
        difference = max(difference, *(float((ends[0][k].float() - ends[1][k].float()).abs().max()) for k in ends[0]))
    result = {
        "first_epoch_seconds": first,
        "later_epoch_seconds": {arm: statistics.median(seconds) for arm, seconds in later.items()},
        "later_epoch_range": {arm: [min(seconds), max(seconds)] for arm, seconds in later.items()},
        "times_faster": statistics.median(later["without"]) / statistics.median(later["with"]),
        "largest_difference_of_a_weight": difference,
        "size": options.size,
        "machine": f"{platform.machine()}, torch {torch.__version__}, one thread",
    }
    options.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
