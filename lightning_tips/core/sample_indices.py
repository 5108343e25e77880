"""Which samples of the dataset a training batch holds, without an edit to dataset or loader."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_tips.core.lightning_private import IndexSource, change_train_loaders, reads_index_source


def record_train_indices(trainer: pl.Trainer) -> Callable[[], None]:
    """Lets the training loader of a run write down which samples its batches hold, wherever it comes from.

    A loader that cannot (see :func:`unknown_indices`), or one among several, stays as it is.

    Args:
        trainer: The trainer, from ``setup`` on.

    Returns:
        A function that takes it back, for ``on_release`` of a tip.
    """
    changed: list[tuple[DataLoader[Any], type[DataLoader[Any]]]] = []

    def change(loaders: Any) -> Any:
        loader = loaders.iterables if isinstance(loaders, CombinedLoader) else loaders
        if isinstance(loader, DataLoader) and not isinstance(loader, _Recording):
            kind = type(loader)
            if record_indices(loader):
                changed.append((loader, kind))
        return loaders

    take_back = change_train_loaders(trainer, change)

    def undo() -> None:
        take_back()
        for loader, kind in changed:  # the user's own one must come out of the run as it went in
            loader.__class__ = kind
        changed.clear()

    return undo


def record_indices(loader: DataLoader[Any]) -> bool:
    """Lets a loader write down the samples of its batches, for :func:`next_indices`.

    Args:
        loader: Changed in place: its class becomes a subclass of what it is, also where Lightning makes it anew with a
            sampler for several ranks.

    Returns:
        Whether it can. One that iterates in a way of its own, or delivers batches in no order, stays as it is.
    """
    if isinstance(loader, _Recording):
        return True
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return False
    if not reads_index_source(type(loader)) or not getattr(loader, "in_order", True):
        return False
    loader.__class__ = _recording_class(type(loader))  # type: ignore[arg-type]
    return True


def next_indices(loader: Any) -> list[int] | None:
    """The samples of the oldest batch that was delivered and not asked for; to be called once for each batch.

    Args:
        loader: One of :func:`record_indices`, in iteration; of any other the answer is None.

    Returns:
        Their places in ``loader.dataset``, in the order of the batch.
    """
    if not isinstance(loader, _Recording) or not loader._delivered:
        return None
    return loader._delivered.popleft()


def unknown_indices(loader: Any, world_size: int) -> str | None:
    """Why a sample of an epoch cannot be known by its place in the dataset; None if it can.

    It can where the loader writes it down, and where no sample comes twice in an epoch, on whatever rank: repeats
    could not be told apart.

    Args:
        loader: As the run uses it.
        world_size: How many ranks draw from it.
    """
    if not isinstance(loader, _Recording):
        return f"a {type(loader).__name__} does not tell which samples its batches hold"
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        return f"a {type(batches).__name__} may draw a sample more than once in an epoch"
    sampler = batches.sampler  # with batch_sampler=... the loader's own one is another
    once = type(sampler) is DistributedSampler
    if world_size == 1:
        once |= type(sampler) is SequentialSampler
        if type(sampler) is RandomSampler:
            once = not sampler.replacement and sampler.num_samples <= len(sampler.data_source)
    return None if once else f"a {type(sampler).__name__} may draw a sample more than once in an epoch"


class _Writer:
    """Stands before a loader's batch sampler and writes down what it gives out."""

    def __init__(self, batches: Any, loader: _Recording) -> None:
        self._batches, self._loader = batches, loader

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        # At once, not with the first batch: of several iterators that are begun, the last one counts.
        fetched: deque[list[int]] = deque()
        self._loader._fetched = fetched
        return self._write(fetched)

    def _write(self, fetched: deque[list[int]]) -> Iterator[Any]:
        for indices in self._batches:
            fetched.append([int(index) for index in indices])
            yield indices


class _Recording(IndexSource):
    _fetched: deque[list[int]] | None = None  # batches that were asked for; with workers these are ahead
    _delivered: deque[list[int]] | None = None  # batches that came out, until somebody asks for them

    def index_source(self, source: Any) -> Any:
        return _Writer(source, self)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()  # made at once, so that workers begin now
        fetched, self._delivered = self._fetched, deque[list[int]]()
        if fetched is None:
            raise RuntimeError(f"{type(self).__name__} iterates without its batch sampler.")
        return self._deliver(batches, fetched, self._delivered)

    def _deliver(self, batches: Iterator[Any], fetched: deque[list[int]], delivered: deque[list[int]]) -> Iterator[Any]:
        for batch in batches:
            indices = fetched.popleft()
            if batch is not None:  # Lightning passes over those without a word to the callbacks
                delivered.append(indices)
            yield batch


@cache
def _recording_class(kind: type[DataLoader[Any]]) -> type[DataLoader[Any]]:
    return type(f"Recording{kind.__name__}", (_Recording, kind), {})
