"""The rare class that is ignored: 50 shirts among 1,000 other clothes, and what a balancing sampler does for them.

    python examples/rare_class.py

Trains the same network twice on Fashion-MNIST, without and with the tip (some minutes on two cores), and prints how
many of the shirts each finds. Plots and confusion matrices lie in ``runs/rare_class``. ``--digits`` takes
scikit-learn's digits instead: nothing to download, and done in seconds.
"""

import argparse
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_tips import ClassReportCallback, ImbalancedSamplerCallback, RunReportCallback
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier, ImageDataModule


def data(digits: bool) -> ImageDataModule:
    if digits:  # eights among other digits
        counts = {1: 60, 3: 60, 9: 60, 8: 10}
        return DigitsDataModule(batch_size=32, class_counts=counts, positive_class=8, val_fraction=0.4)
    counts = {0: 250, 2: 250, 3: 250, 4: 250, 6: 50}
    return FashionMNISTDataModule(batch_size=64, class_counts=counts, positive_class="shirt", val_fraction=0.5)


def train(name: str, tips: list[Callback], chosen: Any) -> float:
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=-1,
        max_steps=chosen.steps,
        callbacks=[*tips, ClassReportCallback(), RunReportCallback()],
        logger=CSVLogger("runs/rare_class", name=name),
        log_every_n_steps=5,
        enable_progress_bar=False,
    )
    module = ImageClassifier("resnet8", num_classes=2, in_channels=1)
    trainer.fit(module, datamodule=data(chosen.digits))
    (tested,) = trainer.test(module, datamodule=data(chosen.digits), verbose=False)
    return float(tested["test_balanced_acc"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--epochs", type=int, help="for a quick look: so many times three steps")
    chosen = parser.parse_args()
    if chosen.epochs:
        chosen.steps, chosen.digits = 3 * chosen.epochs, True
    plain = train("plain", [], chosen)
    balanced = train("oversample", [ImbalancedSamplerCallback("oversample")], chosen)
    print(f"Balanced accuracy on the test set: {plain:.1%} without the tip, {balanced:.1%} with it.")


if __name__ == "__main__":
    main()
