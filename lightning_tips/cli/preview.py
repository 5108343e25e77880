"""`lightning-tips preview`: what the augmentation shows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lightning_tips import BatchAugmentationCallback
from lightning_tips.cli.run import BuildCLI
from lightning_tips.core import reason_of, record_indices


def show_preview(arguments: list[str]) -> int:
    """Writes the contact sheet of a BatchAugmentationCallback: ``lightning-tips preview --config run.yaml``.

    Takes what ``fit`` takes, and ``--out`` for the PNG, by default ``augmentation.png``.
    """
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--out", type=Path, default=Path("augmentation.png"))
    chosen, rest = own.parse_known_args(arguments)
    sys.argv = [sys.argv[0], *rest]  # LightningCLI warns of arguments that are given beside those
    cli = BuildCLI(run=False, save_config_callback=None)
    tips = [c for c in cli.trainer.callbacks if isinstance(c, BatchAugmentationCallback)]  # type: ignore[attr-defined]
    if not tips:
        sys.exit("error: there is no BatchAugmentationCallback among trainer.callbacks, so there is nothing to show.")
    source = cli.model if cli.datamodule is None else cli.datamodule
    source.prepare_data()
    source.setup("fit")
    loader = source.train_dataloader()
    if isinstance(loader, DataLoader):
        record_indices(loader)  # as the callback does in a run
    try:
        tips[0].look_at(loader, cli.model)
        for number, batch in enumerate(loader):
            tips[0].begin_batch(loader, number)
            for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):  # they come before the augmentation
                owner = cli.datamodule if cli.datamodule and is_overridden(hook, cli.datamodule) else cli.model
                batch = getattr(owner, hook)(batch, 0)
            if number == 0:
                tips[0].check(batch)
            if tips[0].shows_something(batch):
                break
        else:
            sys.exit("error: the training loader gives no batch with an image that would be augmented.")
        chosen.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        tips[0].draw(cli.trainer, batch, getattr(loader, "dataset", None), chosen.out)
    except (KeyError, TypeError, ValueError, MisconfigurationException) as error:
        sys.exit(f"error: {reason_of(error)}")
    print(f"{chosen.out}: {tips[0].describe()}")
    return 0
