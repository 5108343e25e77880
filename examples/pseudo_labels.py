"""Few labels, many images: the network labels what it is sure of, and learns from it.

    python examples/pseudo_labels.py

Fashion-MNIST with 500 labelled images and 9,500 whose labels nobody has looked at. The same network is trained twice
for as many steps: on the labelled images alone, and from a third of the steps on with pseudo-labels in half of each
batch, renewed each epoch. The guard gives them up if the accuracy on validation images stays below that of the first
run. What happened lies in ``runs/pseudo_labels``: ``tips/run.png``, and ``tips/pseudo_labels.png`` with the labels of
each class. ``--digits`` takes scikit-learn's digits instead: nothing to download. A teacher of another kind brings more
than the network itself, see the method card.
"""

import argparse
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_tips import PseudoLabelCallback, RunReportCallback
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier


def train(name: str, first_round: int, chosen: Any, supervised: str | None = None) -> tuple[float, str]:
    """Returns the accuracy on test images, and the file with the metrics of the run."""
    kind: Any = DigitsDataModule if chosen.digits else FashionMNISTDataModule
    few, others = (60, 900) if chosen.digits else (500, 9500)
    data = kind(batch_size=32, train_size=few, unlabelled_size=others)
    # The set has labels after all: `audit` tells how many pseudo-labels are right. The training never sees them.
    tip = PseudoLabelCallback(
        "unlabelled_dataset",
        start_epoch=first_round,
        threshold=0.9,
        share=0.5,
        audit=True,
        epoch_size=100 * 32,
        reference=supervised,
    )
    trainer = Trainer(
        max_epochs=chosen.epochs,
        callbacks=[tip, RunReportCallback()],
        logger=CSVLogger("runs/pseudo_labels", name=name),
        limit_train_batches=10 if chosen.quick else 1.0,
        log_every_n_steps=5,
        limit_val_batches=16,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    seed_everything(0, verbose=False)
    module = ImageClassifier("resnet8", in_channels=1)
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    return float(tested["test_acc"]), str(Path(trainer.log_dir or "") / "metrics.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--epochs", type=int, help="of 100 steps; for a quick look so many of 10, on the digits")
    chosen = parser.parse_args()
    chosen.quick = chosen.epochs is not None
    chosen.digits |= chosen.quick
    chosen.epochs = 2 + chosen.epochs if chosen.quick else 15
    alone, metrics = train("supervised", chosen.epochs, chosen)
    mixed, _ = train("pseudo", max(1, chosen.epochs // 3), chosen, metrics)
    for accuracy, arm in ((alone, "labelled images alone"), (mixed, "with pseudo-labels")):
        print(f"{accuracy:6.1%} of the test images: {arm}")


if __name__ == "__main__":
    main()
