"""A trained network that has to learn more: it knows five kinds of clothes, and now there are ten, with few images.

    python examples/new_classes.py

First a ResNet-8 learns T-shirts, trousers, pullovers, dresses and coats (Fashion-MNIST, 200 steps). Then five more
kinds come, and of all ten there are 20 images each. Three ways to learn them: from scratch; all layers at once from the
old weights; and transfer: the head alone first, then all layers, at lower rates the further they are from the head.
Here the second wins by a little (58, 72 and 69 % with one seed): the network is small, and the new classes are much
like the old ones. Plots of the runs lie in ``runs/new_classes``. ``--digits`` takes scikit-learn's digits instead:
nothing to download.
"""

import argparse
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_tips import RunReportCallback, TransferLearningCallback
from lightning_tips.transfer import load_with_new_classes
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier, ImageDataModule


def data(digits: bool, images: int, classes: int) -> ImageDataModule:
    kind: Any = DigitsDataModule if digits else FashionMNISTDataModule
    counts = dict.fromkeys(range(classes), images)
    return kind(batch_size=32, class_counts=counts, val_fraction=0.2)


def train(name: str, module: ImageClassifier, tips: list[Callback], images: int, chosen: Any, **length: Any) -> float:
    trainer = Trainer(
        **length,
        callbacks=[*tips, RunReportCallback()],
        logger=CSVLogger("runs/new_classes", name=name),
        log_every_n_steps=5,
        limit_val_batches=20,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    seed_everything(0, verbose=False)
    trainer.fit(module, datamodule=data(chosen.digits, images, module.num_classes))
    (tested,) = trainer.test(module, datamodule=data(chosen.digits, images, module.num_classes), verbose=False)
    return float(tested["test_acc"])


def make(classes: int, rate: float = 1e-3) -> ImageClassifier:
    seed_everything(0, verbose=False)
    return ImageClassifier("resnet8", num_classes=classes, in_channels=1, optimizer=partial(torch.optim.Adam, lr=rate))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20, help="of each class, when there are ten")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--epochs", type=int, help="for a quick look: the length of everything, on the digits")
    chosen = parser.parse_args()
    chosen.digits |= chosen.epochs is not None

    old = make(5)
    length = {"max_epochs": chosen.epochs} if chosen.epochs else {"max_epochs": -1, "max_steps": 200}
    print(f"{train('five', old, [], 80 if chosen.digits else 3000, chosen, **length):6.1%} with five classes")

    epochs = chosen.epochs or 15
    # No augmentation here, so what the frozen layers make of an image is computed once. (`Phase` is a class of
    # lightning_tips.transfer; dicts do as well, and in yaml they are all there is.)
    phases: Any = [
        {"name": "head", "epochs": epochs, "lr": 1e-2, "l2": 1e-3},
        {"name": "all", "train": "all", "lr": 1e-3, "layer_decay": 0.7, "warmup_steps": 10},
    ]
    transfer = TransferLearningCallback(phases, cache_features=True)
    results = {}
    arms: dict[str, list[Callback]] = {"from scratch": [], "all layers": [], "transfer": [transfer]}
    for arm, tips in arms.items():
        module = make(10)
        if arm != "from scratch":  # the rows of the old classes are kept, those of the new ones are as they were made
            load_with_new_classes(module, old.state_dict())
        results[arm] = train(arm.replace(" ", "_"), module, tips, chosen.images, chosen, max_epochs=2 * epochs)
    for arm, accuracy in results.items():
        print(f"{accuracy:6.1%} of the test images of ten classes: {arm}")


if __name__ == "__main__":
    main()
