"""Adam until the validation loss stalls, then SGD: four lines in any training script.

    python examples/adam_then_sgd.py

Trains a small network on scikit-learn's digits for under a minute and leaves plot, metrics and events in
``runs/adam_then_sgd``.
"""

import argparse

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_tips import OptimizerSwitchCallback, RunReportCallback
from lightning_tips.vision import DigitsDataModule, ImageClassifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=25)
    chosen = parser.parse_args()
    seed_everything(0)

    # Any LightningModule: this one trains with Adam and knows nothing of the switch.
    module = ImageClassifier("resnet8", in_channels=1)
    switch = OptimizerSwitchCallback(
        lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9), monitor="val_loss", patience=3
    )
    trainer = Trainer(
        max_epochs=chosen.epochs,
        callbacks=[switch, RunReportCallback()],
        logger=CSVLogger("runs", name="adam_then_sgd"),
        log_every_n_steps=5,
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=64))
    trainer.test(module, datamodule=DigitsDataModule(batch_size=64))


if __name__ == "__main__":
    main()
