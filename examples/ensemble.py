"""Five networks in one fit, their vote against each of them, and the vote as one ONNX file.

    python examples/ensemble.py

Trains on scikit-learn's digits: nothing to download, a minute or two on two cores. Weights and reliability are drawn
into ``runs/ensemble/version_*/tips``.
"""

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_tips import EnsembleModule, RunReportCallback
from lightning_tips.vision import DigitsDataModule, ImageClassifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    chosen = parser.parse_args()
    seed_everything(0, verbose=False)
    ensemble = EnsembleModule(
        member=lambda: ImageClassifier("resnet8", in_channels=1), n=5, member_data="bootstrap", weights="best"
    )
    trainer = Trainer(
        max_epochs=chosen.epochs,
        callbacks=[RunReportCallback()],
        logger=CSVLogger("runs", name="ensemble"),
        log_every_n_steps=5,
        enable_progress_bar=False,
    )
    data = DigitsDataModule(batch_size=64)
    trainer.fit(ensemble, datamodule=data)
    (found,) = trainer.test(ensemble, datamodule=data, verbose=False)
    for index in range(len(ensemble.members)):
        weight = float(ensemble.vote_weights[index])
        print(f"member {index}, weight {weight:.2f}: {found[f'test_acc/member_{index}']:6.1%} on the test set")
    print(f"the vote: {found['test_acc']:6.1%}, calibration error {found['test_ece']:.1%}")

    predicted = trainer.predict(ensemble, data.test_dataloader())
    assert predicted
    unsure = max(float(part["disagreement"].max()) for part in predicted)  # type: ignore[call-overload]
    print(f"the members disagree most by {unsure:.2f} nats")
    path = Path(trainer.log_dir or ".", "vote.pt2")
    difference = ensemble.export(path, next(iter(data.test_dataloader())))
    print(f"{path}: one network, within {difference:.1g} of the members")


if __name__ == "__main__":
    main()
