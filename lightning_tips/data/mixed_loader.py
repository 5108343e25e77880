"""The training loader of a run with a second set of samples mixed in: every form of sample, workers, ranks, resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_tips.core import (
    SeekableSampler,
    did_you_mean,
    inputs_of,
    reason_of,
    replace_targets,
    resumable,
    sampler_ranks,
    targets_of,
)
from lightning_tips.core.lightning_private import with_dataset
from lightning_tips.data.mixed_draw import MixedSampler

__all__ = ["JoinedDataset", "RelabelledDataset", "find_dataset", "mixed_loader"]


class JoinedDataset(ConcatDataset[Any]):
    """Two datasets one after the other; a batch is fetched from each in one go, where they can do that."""

    @property
    def classes(self) -> Any:
        """Names of the classes, as the first one has them."""
        return getattr(self.datasets[0], "classes", ())

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The samples at these places."""
        first, second = self.datasets
        size = self.cumulative_sizes[0]
        return _fetch_both(first, second, [(i, None) if i < size else (None, i - size) for i in indices])


class RelabelledDataset(Dataset[Any]):
    """Labelled samples, and unlabelled ones with a label that the index brings along.

    The labels are no part of the dataset, so worker processes, which have a copy of it, need not know of new ones.
    To others it is the labelled dataset: its length and its attributes are that one's.

    Args:
        labelled: Samples are ``(inputs, label, ...)`` or a mapping.
        unlabelled: Samples of the same form, with or without a label; or the inputs alone. A label that is there is
            replaced.
        input_key: Key of the inputs, where samples are mappings and it is none of the usual ones.
        target_key: Key of the label, likewise.

    Raises:
        ValueError: If a sample of the one cannot stand beside a sample of the other, or has several labels.
    """

    def __init__(
        self, labelled: Any, unlabelled: Any, input_key: str | None = None, target_key: str | None = None
    ) -> None:
        self.labelled, self.unlabelled = labelled, unlabelled
        self.input_key, self.target_key = input_key, target_key
        self._size, self._extra = len(labelled), len(unlabelled)
        self._like: Any = None
        self._relabel(unlabelled[0], 0)  # finds out before training whether it can

    def index_of(self, places: Any, labels: Any) -> Any:
        """The index of unlabelled samples with labels.

        Args:
            places: Places in the unlabelled set, integers or an array of them.
            labels: A class id for each.
        """
        return self._size + np.asarray(places, np.int64) + self._extra * np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return self._size

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "labelled" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["labelled"], name)

    def __getitem__(self, index: int) -> Any:
        if index < self._size:
            return self.labelled[index]
        label, place = divmod(index - self._size, self._extra)
        return self._relabel(self.unlabelled[place], label)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The samples at these indices."""
        apart = [(i, None) if i < self._size else (None, (i - self._size) % self._extra) for i in indices]
        samples = _fetch_both(self.labelled, self.unlabelled, apart)
        for at, index in enumerate(indices):
            if index >= self._size:
                samples[at] = self._relabel(samples[at], (index - self._size) // self._extra)
        return samples

    def _relabel(self, sample: Any, label: int) -> Any:
        if self._like is None:
            self._like = self.labelled[0]
        like = self._like
        try:
            value = _label_like(targets_of(like, self.target_key), label)
        except (KeyError, TypeError) as error:
            raise ValueError(f"The training samples have no label to be found: {reason_of(error)}") from error
        nested = self.target_key is not None and "." in self.target_key
        if isinstance(like, Mapping) and not nested:
            return self._as_mapping(sample, like, value)
        if nested or (_is_row(sample) and len(sample) == len(like)):
            return replace_targets(sample, value, self.target_key)
        rest = list(sample[1:]) if _is_row(sample) else []
        if len(rest) + 2 != len(like):
            raise ValueError(
                f"A training sample has {len(like)} parts and an unlabelled one {len(sample) if _is_row(sample) else 1}"
                ": let them be of one form, with or without the label."
            )
        parts = [sample[0] if _is_row(sample) else sample, value, *rest]
        return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)

    def _as_mapping(self, sample: Any, like: Mapping[Any, Any], value: Any) -> Any:
        target = self.target_key or next(key for key in like if like[key] is targets_of(like))
        if not isinstance(sample, Mapping):
            inputs = self.input_key or next(key for key in like if like[key] is inputs_of(like))
            sample = {inputs: sample[0] if _is_row(sample) else sample}
        if missing := [key for key in like if key != target and key not in sample]:
            raise ValueError(f"An unlabelled sample lacks {missing}, which the training samples have.")
        return {key: value if key == target else sample[key] for key in like}


def _label_like(label: Any, value: int) -> Any:
    """A class id in the form that labels have."""
    if isinstance(label, Tensor):
        if label.numel() != 1:
            raise ValueError(
                f"A training sample has a label of the shape {tuple(label.shape)}: pseudo-labels are for one class a"
                " sample, not for several labels, soft ones or masks."
            )
        return torch.full_like(label, value)
    if isinstance(label, np.ndarray | np.generic):
        if np.size(label) != 1:
            raise ValueError(f"A training sample has a label of the shape {np.shape(label)}; one class id is needed.")
        return np.full_like(label, value)[()]
    if isinstance(label, list | tuple | Mapping | str):
        raise ValueError(f"A training sample has a {type(label).__name__} as its label; one class id is needed.")
    return type(label)(value)


def _is_row(sample: Any) -> bool:
    return isinstance(sample, list | tuple)


def _fetch_both(first: Any, second: Any, places: Sequence[tuple[Any, Any]]) -> list[Any]:
    """Samples of two datasets, in the order of ``places``: a place in the one or in the other."""
    found: list[Any] = [None] * len(places)
    for number, dataset in enumerate((first, second)):
        wanted = [(at, place[number]) for at, place in enumerate(places) if place[number] is not None]
        if not wanted:
            continue
        inside = [place for _, place in wanted]
        together = getattr(dataset, "__getitems__", None)
        samples = together(inside) if callable(together) else [dataset[place] for place in inside]
        for (at, _), sample in zip(wanted, samples, strict=True):
            found[at] = sample
    return found


def find_dataset(trainer: pl.Trainer, given: Any, asker: str, role: str, argument: str) -> Any:
    """A dataset that was given, or the attribute or method of the DataModule (or the module) that is named so.

    Args:
        trainer: The trainer, once its data is set up.
        given: A dataset, or a name.
        asker: Who needs it, for messages.
        role: What it is, for messages.
        argument: By which it is given.

    Raises:
        MisconfigurationException: If there is no such dataset, or nothing in it.
    """
    dataset = given
    if isinstance(given, str):
        datamodule = getattr(trainer, "datamodule", None)
        owners = [owner for owner in (datamodule, trainer.lightning_module) if owner is not None]
        owner = next((owner for owner in owners if getattr(owner, given, None) is not None), None)
        if owner is None:
            known = [name for o in owners for name in dir(o) if "data" in name.lower() and not name.startswith("_")]
            raise MisconfigurationException(
                f"{asker} looks for the {role} under {given!r}, and neither the DataModule nor the module has that."
                f" Give one of them such a method or attribute, or pass {argument}= a dataset (in yaml class_path and"
                f" init_args). {did_you_mean(given, known)}"
            )
        dataset = getattr(owner, given)
        if callable(dataset) and not hasattr(dataset, "__getitem__"):
            dataset = dataset()
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise MisconfigurationException(
            f"{asker}: the {role} is a {type(dataset).__name__}, whose samples cannot be chosen. Use a dataset with"
            " __getitem__ and __len__."
        )
    if not len(dataset):
        raise MisconfigurationException(
            f"{asker}: the {role} is empty, so there is nothing to mix in. Look at {argument}, or take the tip away."
        )
    return dataset


def mixed_loader(
    trainer: pl.Trainer,
    loader: DataLoader[Any],
    dataset: Any,
    size: int | Callable[[int], int],
    seed: int,
    asker: str,
    begin: Callable[[], None],
) -> DataLoader[Any]:
    """A loader like the one of the run, that draws from two sets.

    A ``SeekableSampler`` that it has, such as an ``ImbalancedSampler``, goes on choosing the samples of the first set.

    Args:
        trainer: The trainer.
        loader: The run's.
        dataset: Holds both sets; the first one's indices are those of the loader's own dataset.
        size: Samples of an epoch over all ranks; or a function of how many the loader draws.
        seed: Of the order.
        asker: For messages.
        begin: Called before the first batch of each epoch is fetched, also by workers.

    Raises:
        MisconfigurationException: If the loader's samples cannot be chosen.
    """
    sampler = loader.sampler
    if loader.batch_size is None:
        raise MisconfigurationException(
            f"{asker} cannot choose the samples of a training loader with batch_sampler="
            f"{type(loader.batch_sampler).__name__}(...) or without batches. Give the DataLoader batch_size=..."
        )
    main: int | SeekableSampler = len(loader.dataset)  # type: ignore[arg-type]
    drawn = len(sampler)  # type: ignore[arg-type]
    if isinstance(sampler, DistributedSampler):
        drawn *= sampler.num_replicas
    if isinstance(sampler, SeekableSampler) and hasattr(sampler, "num_replicas"):
        main = sampler
    elif type(sampler) not in (RandomSampler, SequentialSampler, DistributedSampler):
        rank_zero_info(f"{asker} replaces the {type(sampler).__name__} of the training loader.")
    mixed = MixedSampler(
        main, size(drawn) if callable(size) else size, loader.batch_size, seed, **sampler_ranks(trainer)
    )
    changed = with_dataset(loader, dataset, mixed)
    if not isinstance(changed, _Late):
        changed.__class__ = _late_class(type(changed))  # type: ignore[arg-type]
    changed.begin = begin
    return resumable(changed)


class _Late(DataLoader[Any]):
    """Begins when the first batch is asked for: a tip may still choose the epoch's samples until then."""

    begin: Callable[[], None]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.begin()
        yield from super().__iter__()


@cache
def _late_class(kind: type[DataLoader[Any]]) -> type[DataLoader[Any]]:
    return type(f"Late{kind.__name__}", (_Late, kind), {})
