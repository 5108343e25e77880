"""Which augmentation keeps what an image is of? Asked of a trained network first, trained with afterwards.

    python examples/safe_augmentation.py

Trains a network on 2,000 images of Fashion-MNIST as they are, lets the label guard look at each operation class by
class, shrinks or drops what changes the content, and trains again with the rest (a few minutes on two cores). Plots and
the contact sheet lie in ``runs/safe_augmentation``. ``--digits`` takes scikit-learn's digits instead: nothing to
download, and done in seconds.
"""

import argparse
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_tips import BatchAugmentationCallback, RunReportCallback
from lightning_tips.augmentation import (
    Brightness,
    Erase,
    HorizontalFlip,
    Operation,
    Rotate,
    Shift,
    VerticalFlip,
    guard_table,
    label_guard,
    safe_operation,
)
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier, ImageDataModule

CANDIDATES = [Shift(1), HorizontalFlip(), VerticalFlip(), Rotate(180), Brightness(0.3), Erase((0.02, 0.1))]


def data(digits: bool) -> ImageDataModule:
    if digits:
        return DigitsDataModule(batch_size=32)
    return FashionMNISTDataModule(batch_size=64, train_size=2000)


def train(name: str, tips: list[Callback], chosen: Any) -> tuple[ImageClassifier, float]:
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=chosen.epochs,
        callbacks=[*tips, RunReportCallback()],
        logger=CSVLogger("runs/safe_augmentation", name=name),
        log_every_n_steps=5,
        enable_progress_bar=False,
    )
    module = ImageClassifier("resnet8", in_channels=1)
    trainer.fit(module, datamodule=data(chosen.digits))
    (tested,) = trainer.test(module, datamodule=data(chosen.digits), verbose=False)
    return module, float(tested["test_acc"])


def validation(digits: bool, most: int = 3000) -> tuple[Tensor, Tensor, list[str]]:
    source = data(digits)
    source.setup("fit")
    pairs = [source.val_set[n] for n in range(min(most, len(source.val_set or ())))]  # type: ignore[index]
    return torch.stack([image for image, _ in pairs]), torch.stack([label for _, label in pairs]), [*source.label_names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--digits", action="store_true")
    chosen = parser.parse_args()
    chosen.digits = chosen.digits or chosen.epochs == 1  # a quick look

    network, plain = train("plain", [], chosen)
    images, labels, names = validation(chosen.digits)
    print(guard_table(label_guard(network, images, labels, CANDIDATES), names))

    kept: list[Operation] = []
    for operation in CANDIDATES:
        safe = safe_operation(network, images, labels, operation)
        print(f"{operation} -> {'as it is' if safe == operation else safe or 'dropped'}")
        kept += [] if safe is None else [safe]
    if not kept:
        print(f"Test accuracy: {plain:.1%}. No operation keeps the labels here: train without augmentation.")
        return
    _, augmented = train("augmented", [BatchAugmentationCallback(kept)], chosen)
    print(f"Test accuracy: {plain:.1%} plain, {augmented:.1%} with the augmentation that keeps the labels.")


if __name__ == "__main__":
    main()
