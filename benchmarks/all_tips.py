"""All seven tips in one run against none, over seeds: `configs/all_tips.yaml`, and a vote of its runs.

    python benchmarks/all_tips.py

Trains the yaml with its tips and without any, the same seeds for both, by `lightning-tips compare`, which takes up what
is done; then lets the networks with tips vote, with weights and temperature from the validation data, and tests all on
the 10,000 test images. Writes ``all_tips.json``: accuracy and balanced accuracy in per cent (the training data has
few bags and boots, the test data has as many as of the others), operations and seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer

from lightning_tips import EnsembleModule, load_pruned
from lightning_tips.cli import main as command
from lightning_tips.pruning import count_cost
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs/all_tips.yaml"
ARMS = {"baseline": "all tips", "without": "none"}  # of the comparison, whose reference is the yaml as it is


def trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/all_tips_study"), help="of the runs")
    parser.add_argument("--out", type=Path, default=HERE / "all_tips.json")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    given = sys.argv
    compare = ["compare", f"--config={chosen.config}", "--arms", "without: --trainer.callbacks=null"]
    compare += ["--seeds", str(chosen.seeds), "--out", str(chosen.folder), "--trainer.logger=false"]
    if command(compare):
        sys.exit(f"error: a fit failed; see {chosen.folder}")
    sys.argv = given

    said = yaml.safe_load(chosen.config.read_text())
    kinds: dict[str, Any] = {"DigitsDataModule": DigitsDataModule, "FashionMNISTDataModule": FashionMNISTDataModule}
    data = kinds[said["data"]["class_path"]](**said["data"]["init_args"])
    data.setup("test")
    images, _ = next(iter(data.test_dataloader()))
    results: dict[str, Any] = {}
    for arm, name in ARMS.items():
        rows = []
        for seed in range(chosen.seeds):
            folder = chosen.folder / f"{arm}-seed{seed}"
            module = load_pruned(folder / "last.ckpt", ImageClassifier)
            cost = count_cost(module, images[:1])
            rows.append(_tested(module, data) | {"macs": cost.macs, "parameters": cost.parameters})
            rows[-1]["cpu_seconds"] = round(json.loads((folder / "record.json").read_text())["cpu_seconds"], 1)
        results[name] = rows
    paths = [chosen.folder / f"baseline-seed{seed}/last.ckpt" for seed in range(chosen.seeds)]
    ensemble = EnsembleModule.from_checkpoints(paths, ImageClassifier)
    data.setup("fit")
    ensemble.fit_weights(data.val_dataloader())
    results["all tips, vote"] = [_tested(ensemble, data)]
    written = {
        "seeds": chosen.seeds,
        "arms": results,
        "mean": {
            arm: {key: statistics.fmean(row[key] for row in rows) for key in rows[0]} for arm, rows in results.items()
        },
        "weights": [round(float(weight), 3) for weight in ensemble.vote_weights],
        "machine": f"{platform.machine()}, {chosen.threads} threads, torch {torch.__version__}",
    }
    chosen.out.write_text(json.dumps(written, indent=1) + "\n")
    for arm, mean in written["mean"].items():
        print(f"{arm:16} " + ", ".join(f"{key} {value:,.2f}" for key, value in mean.items()))
    return written


def _tested(module: Any, data: Any) -> dict[str, float]:
    (found,) = trainer().test(module, datamodule=data, verbose=False)
    recalls = [v for k, v in found.items() if k.startswith("test_recall/")]
    row = {"test_acc": round(100 * found["test_acc"], 2)}
    if recalls:
        row["worst_recall"] = round(100 * min(recalls), 2)
    if "test_balanced_acc" in found:
        row["test_balanced_acc"] = round(100 * found["test_balanced_acc"], 2)
    return row


if __name__ == "__main__":
    main()
