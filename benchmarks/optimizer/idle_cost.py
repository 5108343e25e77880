"""What the attached callback costs while it waits, as a share of a training step of ResNet-8.

    python benchmarks/optimizer/idle_cost.py

One run of `Trainer.fit` on Fashion-MNIST, in which blocks of ten steps take turns: without the callback, with it
waiting for a plateau, and with it watching the steps for ``lr="auto"``. Process CPU time, one thread. The cost of an
arm is the median, over the rounds, of its block against the block without in the same round, minus one.
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

from lightning_tips import OptimizerSwitchCallback
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier

BLOCK = 10  # steps; the projection looks at one step in ten


class TakeTurns(Callback):
    """Puts the arms' callbacks into the trainer in turn and takes the time of each block of steps."""

    def __init__(self, arms: dict[str, OptimizerSwitchCallback | None]) -> None:
        self.arms = arms
        self.seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        self._blocks = -1
        self._started = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % BLOCK:
            return
        names = list(self.arms)
        if self._blocks >= 0:
            self.seconds[names[self._blocks % len(names)]].append((time.process_time() - self._started) / BLOCK)
        self._blocks += 1
        tip = self.arms[names[self._blocks % len(names)]]
        for other in self.arms.values():
            if other is not None and other._projection is not None:
                other._projection.unwatch()
        if tip is not None and tip._projection is not None:
            tip._projection.watch(trainer.optimizers[0])
        trainer.callbacks = [self] if tip is None else [self, tip]  # type: ignore[attr-defined]
        self._started = time.process_time()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("idle_cost.json"))
    parser.add_argument("--steps", type=int, default=400, help="steps of each arm")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits, for a quick look")
    chosen = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)

    arms: dict[str, OptimizerSwitchCallback | None] = {
        "without": None,
        "waiting": OptimizerSwitchCallback(trigger="plateau", patience=1000),
        "waiting_auto_lr": OptimizerSwitchCallback(trigger="plateau", patience=1000, lr="auto"),
    }
    turns = TakeTurns(arms)
    module = ImageClassifier("resnet8", in_channels=1)
    data = DigitsDataModule(batch_size=64) if chosen.digits else FashionMNISTDataModule(batch_size=64)
    Trainer(
        accelerator="cpu",
        max_steps=BLOCK + chosen.steps * len(arms),
        limit_val_batches=1,
        callbacks=[turns, *[tip for tip in arms.values() if tip is not None]],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=data)

    rounds = min(len(seconds) for seconds in turns.seconds.values())
    result: dict[str, Any] = {
        "step_ms": round(1000 * statistics.median(turns.seconds["without"]), 3),
        "steps_an_arm": rounds * BLOCK,
        "data": type(data).__name__,
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
    }
    for arm in list(arms)[1:]:
        ratios = [a / b - 1 for a, b in zip(turns.seconds[arm], turns.seconds["without"], strict=False)]
        quarters = statistics.quantiles(ratios, n=4)
        result[arm] = {
            "cost_percent_median": round(100 * statistics.median(ratios), 2),
            "cost_percent_quartiles": [round(100 * quarters[0], 2), round(100 * quarters[2], 2)],
        }
    # The callback's own code in a step, called alone: far below what the comparison above can resolve.
    tip = arms["waiting"]
    assert tip is not None
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    tip._started_epoch = trainer.current_epoch
    started = time.process_time()
    for _ in range(100_000):
        tip.on_train_batch_start(trainer, module, None, 1)
    hook = (time.process_time() - started) / 100_000
    result["hook_microseconds"] = round(1e6 * hook, 2)
    result["hook_percent_of_step"] = round(100 * 1000 * hook / result["step_ms"], 4)
    chosen.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
