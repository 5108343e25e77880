"""The rare class that is ignored: 50 shirts among 1,000 other clothes, and what brings them to light.

    python examples/rare_class.py

Trains the same network three times on Fashion-MNIST: plainly, with a balancing sampler, and with augmentation of all
classes beside it (some minutes on two cores), and prints what each is worth. Plots and confusion matrices lie in
``runs/rare_class``. ``--digits`` takes scikit-learn's digits instead, which are too easy to show much: nothing to
download, and done in seconds.
"""

import argparse
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_tips import BatchAugmentationCallback, ClassReportCallback, ImbalancedSamplerCallback, RunReportCallback
from lightning_tips.augmentation import HorizontalFlip, Rotate, Shift
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
    policy = [HorizontalFlip(), Rotate(10), Shift(1 if chosen.digits else 2)]
    results = {
        "plain": train("plain", [], chosen),
        "over-sampled": train("oversample", [ImbalancedSamplerCallback()], chosen),
        "over-sampled, all classes augmented": train(
            "augment", [ImbalancedSamplerCallback(), BatchAugmentationCallback(policy)], chosen
        ),
    }
    for arm, accuracy in results.items():
        print(f"{accuracy:6.1%} balanced accuracy on the test set: {arm}")


if __name__ == "__main__":
    main()
