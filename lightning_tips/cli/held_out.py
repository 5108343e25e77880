"""The data that weigh members which were trained apart: whether no member can have been trained on them."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import Dataset, IterableDataset, Subset

__all__ = ["held_out_data", "moves_with_seed"]

LOOKED_AT = 8
"""Samples that are compared where a dataset does not say which ones it holds."""


def held_out_data(model: pl.LightningModule, datamodule: pl.LightningDataModule | None) -> dict[str, Any]:
    """What ``trainer.validate`` gets: the DataModule of the yaml, or the loader that its module brings.

    Raises:
        ValueError: If neither has validation data.
    """
    if datamodule is not None and is_overridden("val_dataloader", datamodule):
        return {"datamodule": datamodule}
    if is_overridden("val_dataloader", model):
        return {"dataloaders": model.val_dataloader()}
    raise ValueError(
        "there are no validation data, on which the members could be weighed: let the DataModule of the yaml (`data`)"
        " have a val_dataloader."
    )


def moves_with_seed(
    first: pl.LightningDataModule,
    second: pl.LightningDataModule,
    seeds: tuple[int, int],
    trainer: pl.Trainer | None = None,
) -> bool | None:
    """Whether a DataModule splits off other validation data under another seed.

    Members that are trained under seeds of their own would then have been trained on what weighs them.

    Args:
        first: Made under the first seed. Both are set up here as copies, and stay as they are.
        second: Made under the second seed.
        seeds: Set again before each is set up; ``seed_everything`` stays at the second one.
        trainer: What they see as theirs.

    Returns:
        True if they hold other samples; None if that cannot be told for sure: samples look different, which random
        transforms of one and the same sample may do as well.
    """
    sets: list[Any] = []
    for datamodule, seed in zip((first, second), seeds, strict=True):
        with isolate_rng():
            pl.seed_everything(seed, verbose=False)
            own = copy.deepcopy(datamodule)
            own.trainer = trainer
            own.setup("validate")
            loader = CombinedLoader(own.val_dataloader(), "sequential").flattened[0]
            sets.append(getattr(loader, "dataset", None))
    one, other = sets
    if isinstance(one, Subset) and isinstance(other, Subset):
        return sorted(map(int, one.indices)) != sorted(map(int, other.indices))
    if not isinstance(one, Dataset) or isinstance(one, IterableDataset) or not hasattr(one, "__len__"):
        return False
    if len(one) != len(other):
        return True
    places = range(0, len(one), max(len(one) // LOOKED_AT, 1))
    return False if all(_equal(one[i], other[i]) for i in places) else None


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.shape == second.shape and bool(torch.equal(first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    if hasattr(first, "tobytes"):  # numpy's arrays, and pictures
        return bool(first.tobytes() == second.tobytes())
    return bool(first == second)
