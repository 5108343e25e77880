"""Half of the operations taken out of a network while it trains, and the small one loaded again.

    python examples/smaller_network.py

Trains a small residual network on scikit-learn's digits for about a minute, and leaves channels before and after, plot
and metrics in ``runs/smaller_network``.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_tips import FilterPruningCallback, RunReportCallback, load_pruned
from lightning_tips.vision import DigitsDataModule, ImageClassifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    chosen = parser.parse_args()
    seed_everything(0)

    # Any LightningModule: this one knows nothing of pruning.
    module = ImageClassifier("resnet8", in_channels=1)
    steps = max(1, min(4, chosen.epochs // 4))
    prune = FilterPruningCallback(
        target={"macs": 0.5},
        steps=steps,
        start_epoch=chosen.epochs // 4,
        every_n_epochs=max(1, chosen.epochs // 8),
        distill=1.0,
    )
    best = ModelCheckpoint(monitor="val_acc", mode="max", save_weights_only=True)
    trainer = Trainer(
        max_epochs=chosen.epochs,
        callbacks=[prune, best, RunReportCallback()],
        logger=CSVLogger("runs", name="smaller_network"),
        log_every_n_steps=5,
    )
    data = DigitsDataModule(batch_size=64)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, ckpt_path="best")

    # The small network by itself, without Trainer or callback.
    small = load_pruned(Path(best.best_model_path), ImageClassifier).eval()
    with torch.no_grad():
        print(small(torch.rand(1, 1, 8, 8)).shape, f"{sum(p.numel() for p in small.parameters()):,} parameters")


if __name__ == "__main__":
    main()
