"""What would more data bring? A learning curve in Python, without the command.

    python examples/learning_curve.py

Trains a small network on nested parts of scikit-learn's digits, with three seeds each (some minutes on one core), fits
a curve to the scores of the smaller parts, and compares what it says of all the data with what all the data brings.
The plot of the last run lies in ``runs/learning_curve``. For a yaml, ``lightning-tips curve`` does all of it.
"""

import argparse

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_tips import RunReportCallback, SubsetCallback, fit_learning_curve
from lightning_tips.vision import DigitsDataModule, ImageClassifier


def train(size: int, seed: int, epochs: int) -> float:
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[SubsetCallback(size, seed), RunReportCallback()],
        logger=CSVLogger("runs/learning_curve", name=f"{size}_samples_seed_{seed}"),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    # Half of the digits validate, the same for every size and seed: small differences are to be seen.
    data = DigitsDataModule(batch_size=16, val_fraction=0.5)
    trainer.fit(ImageClassifier("resnet8", in_channels=1), datamodule=data)
    return float(trainer.callback_metrics["val_acc"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[30, 60, 120, 240, 719], help="the last is held out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    chosen = parser.parse_args()
    if chosen.epochs == 1:  # for a quick look
        chosen.seeds = 1
    *sizes, largest = sorted(chosen.sizes)
    scores = [[train(size, seed, chosen.epochs) for seed in range(chosen.seeds)] for size in sizes]
    for size, row in zip(sizes, scores, strict=True):
        print(f"{size:5} samples: " + ", ".join(f"{score:.3f}" for score in row))
    curve = fit_learning_curve(sizes, scores)
    truth = train(largest, 0, chosen.epochs)
    if curve.abstains:
        print(f"Nothing can be told of more data: {curve.reason}.")
    else:
        low, high = curve.interval(largest, fits=1)
        print(f"{largest:5} samples: {curve.predict(largest):.3f} expected, {low:.3f} to {high:.3f} with 90 %")
        print(f"For 99 %: {curve.samples_for(0.99)}")
    print(f"{largest:5} samples: {truth:.3f} it is")


if __name__ == "__main__":
    main()
