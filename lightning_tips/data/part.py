"""The base of callbacks that train any run on a part of its training data."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from lightning_tips.core import (
    ActsOn,
    EpochSampler,
    LoaderTip,
    bin_targets,
    do_ranks_agree,
    find_labels,
    resumable,
    sampler_of,
    sampler_ranks,
)
from lightning_tips.core.lightning_private import with_dataset

__all__ = ["PartCallback", "print_of_part", "stratification"]

BINS = 10


class PartCallback(LoaderTip):
    """Gives each training DataLoader a ``Subset`` in place of its dataset, in any run. Subclasses say which.

    It comes before everything else that changes the training loaders. The order of an epoch depends on the seed and the
    epoch alone, so that all ranks agree and a resumed run goes on with the batches that are still due. Validation and
    test data are left alone.

    Args:
        seed: Of the choice, and of the order of training.
        stratify: Whether each class keeps its share, see :func:`stratification`.
        target_key: Where samples are dicts: the key of the target, if it is none of the usual ones.

    Raises:
        MisconfigurationException: Before the first step, for data that cannot be chosen from.
    """

    tip = "data"
    acts_on = ActsOn.DATA
    comes_first = True

    def __init__(self, seed: int, stratify: bool, target_key: str | None) -> None:
        self.seed = seed
        self.stratify = stratify
        self.target_key = target_key
        self.chosen: list[Subset[Any]] = []
        """The part of each training loader, once training has begun."""
        self._how: list[str] = []
        self._prints: list[str] = []
        self._resumed_from: list[str] = []

    @abstractmethod
    def choose(self, groups: Any) -> NDArray[np.int64]:
        """The places of the samples to train on, in ascending order.

        Args:
            groups: What :func:`stratification` found: a class for each sample, or the number of samples.

        Raises:
            ValueError: If that cannot be.
        """

    @abstractmethod
    def size_of_part(self, total: int) -> int:
        """How many of ``total`` samples :meth:`choose` will choose."""

    @abstractmethod
    def plan(self) -> str:
        """What the table at fit start says before the data is known."""

    def describe(self) -> str:
        """For the table at fit start."""
        parts = [f"{len(one):,} of {len(one.dataset):,} samples, {how}" for one, how in self._parts()]  # type: ignore[arg-type]
        return "; ".join(parts) or self.plan()

    def conflict_with(self, other: object) -> str | None:
        """Two of them, of whatever kind, would take a part of a part."""
        if isinstance(other, PartCallback):
            return "both choose a part of the training data. Keep one (the mixin brings one, too)."
        return None

    def _parts(self) -> list[tuple[Subset[Any], str]]:
        return list(zip(self.chosen, self._how, strict=True))

    # ---- state

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self._resumed_from = []

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint: which samples were chosen, as a hash, to notice a resume with others."""
        return super().state_dict() | {"chosen": list(self._prints)}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`."""
        self._resumed_from = list(state["chosen"])

    # ---- the part

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets the last part."""
        super().prepare(trainer, pl_module)
        self.chosen, self._how, self._prints = [], [], []

    def change_loaders(self, trainer: pl.Trainer, loaders: list[DataLoader[Any]]) -> list[DataLoader[Any]]:
        """Cuts them."""
        made = [self._cut(trainer, loader) for loader in loaders]
        self.chosen = [loader.dataset for loader, _, _ in made]  # type: ignore[misc]
        self._how, self._prints = [how for _, how, _ in made], [found for _, _, found in made]
        return [loader for loader, _, _ in made]

    def _cut(self, trainer: pl.Trainer, loader: DataLoader[Any]) -> tuple[DataLoader[Any], str, str]:
        """The loader of the part, how it was chosen, and a hash of it."""
        self.check(loader)
        dataset: Any = loader.dataset
        indices, how, problem = None, "", None
        try:
            groups, how = stratification(
                dataset, self.size_of_part(len(dataset)), self.stratify, self.target_key, trainer.is_global_zero
            )
            indices = self.choose(groups)
        except (ValueError, TypeError) as error:
            problem = error
        # First all ranks meet, then they raise: one that raised alone would leave the others waiting.
        print_ = f"{problem}" if indices is None else print_of_part(indices)
        same = do_ranks_agree(trainer, print_)
        if indices is None:
            raise MisconfigurationException(f"{type(self).__name__}: {problem}") from problem
        if not same:
            raise MisconfigurationException(
                f"The ranks have different training data, so {type(self).__name__} cannot choose the same part of it. A"
                " split without a seed does that: give random_split a generator with one."
            )
        given = sampler_of(loader)
        shuffle = not isinstance(given, SequentialSampler) and bool(getattr(given, "shuffle", True))
        sampler = EpochSampler(len(indices), self.seed, shuffle, **sampler_ranks(trainer))
        part = Subset(dataset, indices.tolist())
        return resumable(with_dataset(loader, part, sampler, _drop_last(loader, len(sampler)))), how, print_

    def check(self, loader: DataLoader[Any]) -> None:
        """Refuses a loader that cannot be given a part of its dataset.

        Raises:
            MisconfigurationException: With what to do.
        """
        if isinstance(loader.dataset, IterableDataset):
            raise MisconfigurationException(
                f"{type(self).__name__} cannot choose from {type(loader.dataset).__name__}: an IterableDataset decides"
                " itself what comes. Use a dataset with __getitem__ and __len__, or limit_train_batches."
            )
        sampler = sampler_of(loader)
        plain = type(sampler) in (RandomSampler, SequentialSampler, DistributedSampler, EpochSampler)
        if plain and isinstance(sampler, RandomSampler):
            plain = not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
        if not plain or (loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler):
            kind = type(sampler if not plain else loader.batch_sampler).__name__
            raise MisconfigurationException(
                f"A training loader chooses its samples by {kind}, which knows the whole dataset only, so"
                f" {type(self).__name__} cannot give it a part. Give the DataLoader shuffle=True and batch_size=...; to"
                " balance the classes put ImbalancedSamplerCallback among the callbacks, which balances the part."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells once what the part is."""
        super().on_train_start(trainer, pl_module)
        before, self._resumed_from = self._resumed_from, []
        if before and before != self._prints:
            self.record(trainer, "other samples than before the resume", samples=len(self.chosen[0]))
        if not self.events:
            for part, how in self._parts():
                self.record(trainer, f"a part of the data, {how}", samples=len(part), of=len(part.dataset))  # type: ignore[arg-type]


def print_of_part(indices: NDArray[np.int64]) -> str:
    """A hash of the places of the samples, which the checkpoint keeps in ``chosen``."""
    return hashlib.blake2b(indices.tobytes(), digest_size=16).hexdigest()


def stratification(
    dataset: Any, size: int, stratify: bool = True, target_key: str | None = None, progress: bool = True
) -> tuple[Any, str]:
    """What :func:`nested_subset` chooses by in a dataset.

    Args:
        dataset: With a length and integer indices.
        size: How many samples will be chosen: of numbers there are not more bins than that.
        stratify: Whether by class, or by ten bins of equal count where the targets are floats; else by nothing.
        target_key: Key of the target where samples are dicts.
        progress: Whether to show a progress bar if all samples have to be read.

    Returns:
        The classes (N,) or (N, C), or the number of samples; and a few words on it.

    Raises:
        ValueError: If no targets are found, or a sample has several numbers.
        TypeError: If they are no classes.
    """
    if not stratify:
        return len(dataset), "not stratified"
    try:
        return find_labels(dataset, target_key, progress), "stratified by class"
    except TypeError as error:
        if "floats" not in str(error):
            raise
    values = find_labels(dataset, target_key, progress, raw=True)
    if values.ndim > 1 and values.shape[1:] != (1,):
        raise ValueError(
            f"The targets of a sample are {values.shape[1:]} numbers, by which nothing can be stratified; choose"
            " without them: stratify=False."
        )
    bins = min(BINS, size)
    return (bin_targets(values, bins) if bins > 1 else len(values)), f"stratified by {bins} bins of the targets"


def _drop_last(loader: DataLoader[Any], samples: int) -> bool | None:
    """Whether the last batch, where it is not full, is left out; None: as the loader has it.

    Args:
        loader: That of the whole data.
        samples: Of an epoch of the part, on one rank.
    """
    batches = loader.batch_sampler
    if not isinstance(batches, BatchSampler) or batches.batch_size == 1:
        return None
    size = batches.batch_size
    if samples < size:
        return False if batches.drop_last else None  # else there would be no batch at all
    return True if samples % size == 1 else None  # BatchNorm cannot train on a batch of one
