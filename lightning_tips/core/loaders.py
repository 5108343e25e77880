"""Training loaders: to change them in any run, and to go on in the middle of an epoch after a resume."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader

from lightning_tips.core.lightning_private import change_train_loaders, epoch_of_samplers, is_epoch_finished


@runtime_checkable
class SeekableSampler(Protocol):
    """A sampler whose order depends on the epoch and the position alone, and that can begin anywhere."""

    epoch: int

    def __len__(self) -> int:
        """Samples of an epoch on this rank."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration draws."""

    def set_position(self, epoch: int, position: int) -> None:
        """Lets the next iteration of ``epoch`` begin after ``position`` of its samples."""


Loaders = list[DataLoader[Any]]


def replace_train_loaders(
    trainer: pl.Trainer, change: Callable[[Loaders], Loaders], first: bool = False
) -> Callable[[], None]:
    """Changes the training loaders of a run, wherever they come from: DataModule, module, or the arguments of ``fit``.

    Validation and test data are left alone.

    Args:
        trainer: The trainer, from ``setup`` on.
        change: Takes the loaders, also those in lists, dicts and ``CombinedLoader``, and returns what to use in their
            places. Called each time that the Trainer asks for them.
        first: Whether it comes before the changes of others, whatever the order of the tips: for what decides which
            samples there are.

    Returns:
        A function that takes it back, for ``on_release`` of a tip.
    """

    def change_all(loaders: Any) -> CombinedLoader:
        # A copy, because the user's own one must come out of the run as it went in.
        given = isinstance(loaders, CombinedLoader)
        combined = copy.copy(loaders) if given else CombinedLoader(loaders, "max_size_cycle")
        for loader in combined.flattened:
            if not isinstance(loader, DataLoader):
                raise MisconfigurationException(
                    f"A training loader of {type(loader).__name__} has no sampler to replace; return a"
                    " torch.utils.data.DataLoader from train_dataloader()."
                )
        combined.flattened = change(combined.flattened)
        _place(trainer, combined)
        return combined

    return change_train_loaders(trainer, change_all, first)


def split_train_loader(
    trainer: pl.Trainer, split: Callable[[DataLoader[Any]], dict[str, DataLoader[Any]]]
) -> Callable[[], None]:
    """Puts several training loaders in the place of one; a batch is then a dict with a batch of each.

    Args:
        trainer: The trainer, from ``setup`` on.
        split: Takes the one loader and returns others by name. Called each time that the Trainer asks for it.

    Returns:
        A function that takes it back, for ``on_release`` of a tip.
    """

    def change(loaders: Any) -> CombinedLoader:
        found = loaders.flattened if isinstance(loaders, CombinedLoader) else [loaders]
        if len(found) != 1 or not isinstance(found[0], DataLoader):
            raise MisconfigurationException(
                "To give each member data of its own there must be one training loader, a torch.utils.data.DataLoader,"
                f" not {type(loaders).__name__}. With other loaders all members see the same batches:"
                " member_data='shared'."
            )
        combined = CombinedLoader(split(found[0]), "max_size_cycle")
        _place(trainer, combined)
        return combined

    return change_train_loaders(trainer, change)


def _place(trainer: pl.Trainer, combined: CombinedLoader) -> None:
    """Tells loaders where the run is, before they get their state."""
    alone = len(combined.flattened) == 1
    for loader in combined.flattened:
        if isinstance(loader, _Resumable):
            loader.place(epoch_of_samplers(trainer), trainer.limit_train_batches, is_epoch_finished(trainer), alone)


def sampler_of(loader: DataLoader[Any]) -> Any:
    """What the batches of a loader are drawn from; that of a plain ``batch_sampler=BatchSampler(...)``, too.

    Such a loader's own ``sampler`` is one that torch made and nobody uses.
    """
    batches = loader.batch_sampler
    return batches.sampler if type(batches) is BatchSampler else loader.sampler


def resumable(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Lets a loader with a :class:`SeekableSampler` go on after a resume with the batches that are still due.

    It counts the batches that it gives out and keeps that number in the checkpoint, as Lightning does for every loader
    with a ``state_dict``. Exact are the choice and the order of the samples; what a random transform in the dataset
    would have drawn is not known to a loader.

    Args:
        loader: Changed in place: its class becomes a subclass of what it is.

    Returns:
        The same loader.
    """
    if not isinstance(loader, _Resumable):
        loader.__class__ = _resumable_class(type(loader))  # type: ignore[arg-type]
    return loader


class _Resumable(DataLoader[Any]):
    _first = 0  # batches that the next iteration leaves out
    _given = 0  # batches given out in the running epoch
    _due_epoch = 0
    _limit: float = 1.0
    _finished = False
    _alone = True

    def place(self, epoch: int, limit: float, finished: bool = False, alone: bool = True) -> None:
        """Tells the epoch that is due, the Trainer's ``limit_train_batches``, and whether a state is of an epoch's end.

        Of several loaders some end an epoch somewhere in their middle, and some are used up before it ends, so they
        cannot know that by themselves.

        Workers begin to fetch before Lightning calls ``set_epoch`` on resume, so the epoch must be known now.
        """
        self._due_epoch, self._limit, self._finished, self._alone = epoch, limit, finished, alone
        self._seekable.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._given, self._first = self._first, 0
        return self._count(super().__iter__())  # made at once, so that workers begin now

    def _count(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Which batch comes next, and how many samples all ranks take in a batch."""
        return {"epoch": self._seekable.epoch, "batches": self._given, "samples": self._samples_a_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on there. A finished epoch is followed by the next."""
        epoch, batches = state["epoch"], state["batches"]
        length = min(len(self), self._limit) if isinstance(self._limit, int) else int(len(self) * self._limit)
        if epoch < self._due_epoch:
            epoch, batches = self._due_epoch, 0
        elif self._finished or (self._alone and batches >= length):
            epoch, batches = epoch + 1, 0
        if batches and state.get("samples", self._samples_a_batch) != self._samples_a_batch:
            rank_zero_warn(
                f"The run is resumed in mid-epoch with {self._samples_a_batch} samples a step over all ranks, and was"
                f" trained with {state['samples']}: the batches cannot be those that are due. The next epoch will be"
                " whole again; for an exact resume keep batch size and number of ranks, or resume at an epoch's end."
            )
        self._first = batches
        self._seekable.set_position(epoch, min(batches * (self.batch_size or 1), len(self._seekable)))

    @property
    def _samples_a_batch(self) -> int:
        return (self.batch_size or 1) * int(getattr(self._seekable, "num_replicas", 1))

    @property
    def _seekable(self) -> SeekableSampler:
        if not isinstance(self.sampler, SeekableSampler):
            raise TypeError(f"{type(self.sampler).__name__} has no set_position: it cannot begin in mid-epoch.")
        return self.sampler


@cache
def _resumable_class(kind: type[DataLoader[Any]]) -> type[DataLoader[Any]]:
    return type(f"Resumable{kind.__name__}", (_Resumable, kind), {})
