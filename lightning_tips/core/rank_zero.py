"""Work that one rank does for all: its result, or its error, is everybody's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn, TypeVar

import lightning.pytorch as pl
import torch.distributed
from torch.distributed import distributed_c10d

from lightning_tips.core.distributed import agree

__all__ = ["on_rank_zero"]

T = TypeVar("T")

COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single"),
    *("barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather", "gather_object", "irecv"),
    *("isend", "monitored_barrier", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter"),
    *("scatter_object_list", "send"),
)
"""What waits for other ranks."""


def on_rank_zero(trainer: pl.Trainer, work: Callable[[], T], hint: str = "") -> T:
    """What ``work`` returns on rank 0, on every rank; where it raises, all ranks do.

    Without that the others would wait for a rank that has failed. ``work`` may not wait for them in its turn: a network
    that communicates in its forward pass gets an error instead of a run that hangs.

    Args:
        trainer: The trainer of the running fit; all its ranks must call.
        work: Its result can be pickled.
        hint: What to do where it communicates, for the error.

    Raises:
        ValueError, TypeError, RuntimeError: The nearest kind to that of the error on rank 0, with its message.
    """
    if trainer.world_size == 1:
        return work()
    result: tuple[T | None, Exception | None] = (None, None)
    if trainer.is_global_zero:
        try:
            with _no_communication(hint):
                result = (work(), None)
        except Exception as error:  # of whatever kind: it is raised below, on all ranks
            kind = next((k for k in (ValueError, TypeError) if isinstance(error, k)), RuntimeError)
            result = (None, kind(str(error)))  # others may not survive the way to another process
    value, failure = agree(trainer, result)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


@contextmanager
def _no_communication(hint: str) -> Iterator[None]:
    """While it is open, collectives of torch.distributed raise."""
    places: tuple[ModuleType, ...] = (torch.distributed, distributed_c10d)
    before = [(place, name, getattr(place, name)) for place in places for name in COLLECTIVES if hasattr(place, name)]
    for place, name, _ in before:
        setattr(place, name, _refusing(name, hint))
    try:
        yield
    finally:
        for place, name, function in before:
            setattr(place, name, function)


def _refusing(name: str, hint: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ValueError(f"What runs here on one rank by itself communicates with the other ranks ({name}). {hint}")

    return refuse
