"""What an ensemble costs: prediction against the sum of its members, training together against training apart.

    python benchmarks/ensemble/cost.py

Process CPU time on one thread, the two arms in turns, medians over rounds; results go to ``cost.json``. ResNet-8 on
28x28 images; what the images show changes nothing here, so they are noise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_tips import EnsembleModule
from lightning_tips.vision import ImageClassifier


class Clock(Callback):
    """CPU time between the first and the last training step."""

    seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin = time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.process_time() - self._begin


def member() -> ImageClassifier:
    return ImageClassifier("resnet8", in_channels=1)


def fit_seconds(module: LightningModule, loader: DataLoader[Any], steps: int) -> float:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            max_steps=steps,
            callbacks=[clock],
        )
        trainer.fit(module, loader)
    return clock.seconds


def in_turns(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        order = list(arms) if number % 2 == 0 else list(reversed(arms))
        for name in order:
            found[name].append(arms[name]())
    return found


def timed(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="of a fit")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--smoke", action="store_true", help="as small as can be")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("cost.json"))
    chosen = parser.parse_args(arguments)
    if chosen.smoke:
        chosen.members, chosen.rounds, chosen.steps, chosen.batch = 2, 1, 2, 8
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*no `val_dataloader`.*|.*LeafSpec.*")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.rand(chosen.batch * max(chosen.steps // 2, 1), 1, 28, 28)
    loader = DataLoader(TensorDataset(images, torch.randint(10, (len(images),))), chosen.batch, shuffle=True)

    ensemble = EnsembleModule(member=member, n=chosen.members, weights="uniform", seed=0).eval()
    single = list(ensemble.members)
    batch = images[: chosen.batch]

    def together() -> None:
        with torch.inference_mode():
            for _ in range(chosen.steps):
                ensemble.predict_step(batch)

    def apart() -> None:
        with torch.inference_mode():
            for module in single:
                for _ in range(chosen.steps):
                    module(batch).float().softmax(1)

    together()  # what is slow the first time
    apart()
    predict = in_turns({"ensemble": lambda: timed(together), "members": lambda: timed(apart)}, 3 * chosen.rounds)

    def fit_together() -> float:
        return fit_seconds(
            EnsembleModule(member=member, n=chosen.members, weights="uniform", seed=0), loader, chosen.steps
        )

    def fit_apart() -> float:
        members: list[Any] = list(EnsembleModule(member=member, n=chosen.members, weights="uniform", seed=0).members)
        return sum(fit_seconds(module, loader, chosen.steps) for module in members)

    train = in_turns({"ensemble": fit_together, "members": fit_apart}, chosen.rounds)

    def summary(found: dict[str, list[float]]) -> dict[str, Any]:
        ratios = [a / b for a, b in zip(found["ensemble"], found["members"], strict=True)]
        medians = {name: statistics.median(times) for name, times in found.items()}
        return {
            "ratio_of_medians": round(medians["ensemble"] / medians["members"], 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
            "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        }

    result = {
        "predict": summary(predict),
        "train": summary(train),
        "members": chosen.members,
        "steps": chosen.steps,
        "batch": chosen.batch,
        "machine": f"{platform.machine()} {platform.system()}, 1 thread, torch {torch.__version__}",
    }
    chosen.out.write_text(json.dumps(result, indent=2) + "\n")
    for name in ("predict", "train"):
        print(f"{name}: {summary(predict if name == 'predict' else train)['ratio_of_medians']:.3f} times the members")
    return result


if __name__ == "__main__":
    main()
