"""How often each class occurs in the data that a Trainer trains on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_tips.core import as_labels, class_counts, do_ranks_agree, find_labels, raise_together, stored_labels

__all__ = ["ClassCounts", "balancing_part", "class_names", "count_classes", "count_together", "training_sets"]


@dataclass(frozen=True)
class ClassCounts:
    """Counts of the training data.

    Attributes:
        counts: Samples of each class or, with several labels a sample, of each label ``(C,)``.
        total: Number of samples if each may have several labels, else ``None``.
    """

    counts: Tensor
    total: int | None = None

    @classmethod
    def of(cls, labels: Any) -> ClassCounts:
        """Counts labels: class indices ``(N,)``, or rows of 0 and 1 ``(N, C)``."""
        array = as_labels(labels)
        return cls(torch.from_numpy(class_counts(array)), len(array) if array.ndim == 2 else None)


def count_classes(trainer: pl.Trainer, target_key: str | None = None, read: bool = True) -> ClassCounts:
    """Counts the labels of the training data, over all its loaders.

    Args:
        trainer: In fit, after its data is set up (from ``on_train_start`` on).
        target_key: Key of the label in samples that are dicts.
        read: Whether to fetch every sample once where the dataset does not keep its labels.

    Raises:
        ValueError: If labels cannot be found.
        TypeError: If they are no classes.
    """
    labels: list[Any] = []
    for dataset in training_sets(trainer):
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"{type(dataset).__name__} is an IterableDataset: its labels are not known before they are read. Give"
                " the weights as a list, for example class_weights([1000, 50])."
            )
        if not read and stored_labels(dataset, target_key=target_key) is None:
            raise ValueError(f"{type(dataset).__name__} does not keep the labels of its samples.")
        labels.append(find_labels(dataset, target_key))
    return ClassCounts.of(np.concatenate(labels) if len(labels) > 1 else labels[0])


def count_together(trainer: pl.Trainer, asker: str, target_key: str | None = None) -> ClassCounts:
    """As :func:`count_classes`, and the same on all ranks, all of which must call.

    Args:
        trainer: As there.
        asker: Who counts, for messages.
        target_key: As there.

    Raises:
        ValueError: If labels cannot be found on this rank.
        TypeError: If they are no classes.
        MisconfigurationException: If the ranks have different counts, or another one has none.
    """
    counts, problem = None, None
    try:
        counts = count_classes(trainer, target_key)
    except (ValueError, TypeError) as error:
        problem = error
    raise_together(trainer, problem)
    assert counts is not None
    if not do_ranks_agree(trainer, f"{counts.counts.tolist()} {counts.total}"):
        raise MisconfigurationException(
            f"The ranks have different training labels, so {asker} cannot go by how many there are of each class. A"
            " split without a seed does that: give random_split a generator with one."
        )
    return counts


def training_sets(trainer: pl.Trainer) -> list[Any]:
    """The datasets of the training loaders; a loader that has none stands for itself."""
    return [getattr(loader, "dataset", loader) for loader in _loaders(trainer.train_dataloader)]


def class_names(trainer: pl.Trainer) -> list[str]:
    """The names of the classes where the training data has them in ``classes``, as torchvision's datasets do."""
    for dataset in training_sets(trainer):
        while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
            dataset = dataset.dataset  # a Subset
        names = getattr(dataset, "classes", None)
        if isinstance(names, list | tuple) and names:
            return [str(name) for name in names]
    return []


def balancing_part(trainer: pl.Trainer) -> str | None:
    """What already balances the classes by sampling, if anything does: its class name."""
    parts: list[Any] = [*trainer.callbacks, getattr(trainer, "datamodule", None)]  # type: ignore[attr-defined]
    for loader in _loaders(trainer.train_dataloader):
        batches = getattr(loader, "batch_sampler", None)
        for sampler in (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            parts.append(sampler)
    # By name, because a tip's callback need not know the others, nor anybody's sampler of one of these names.
    known = (
        "ImbalancedSampler",
        "ImbalancedBatchSampler",
        "ImbalancedDatasetSampler",
        "WeightedRandomSampler",
        "MPerClassSampler",
        "BalanceClassSampler",
    )
    for part in parts:
        for cls in type(part).__mro__:
            if cls.__name__.startswith(known):
                return cls.__name__
    return None


def _loaders(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        for loader in loaders:
            yield from _loaders(loader)
    elif loaders is not None:
        yield loaders
