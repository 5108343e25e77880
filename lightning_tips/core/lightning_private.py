"""Every use of a private attribute of Lightning, and nothing else.

`tests/test_lightning_private.py` fails when Lightning changes one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, Sampler

SHARDED_METADATA = "meta.pt"
"""The file of a sharded checkpoint's folder that holds everything but the tensors (``_METADATA_FILENAME``)."""


def logging_step(trainer: pl.Trainer) -> int:
    """The step under which Lightning logs at this moment.

    It differs from ``trainer.global_step`` with several optimizers. Loggers such as W&B drop what comes with an
    earlier step, so an event has to use Lightning's own count.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def change_train_loaders(trainer: pl.Trainer, change: Callable[[Any], Any]) -> Callable[[], None]:
    """Passes the training loaders through ``change`` whenever the Trainer asks for them, wherever they come from.

    Args:
        trainer: The trainer, from ``setup`` on.
        change: Takes and returns loaders.

    Returns:
        A function that takes the change back.
    """
    source = trainer.fit_loop._data_source
    before = source.dataloader
    source.dataloader = lambda: change(before())  # type: ignore[method-assign]

    def take_back() -> None:
        source.dataloader = before  # type: ignore[method-assign]

    return take_back


def with_sampler(loader: DataLoader[Any], sampler: Sampler[Any]) -> DataLoader[Any]:
    """A loader of the same class, with the same arguments, that draws from ``sampler``."""
    return _update_dataloader(loader, sampler)


def forget_train_loaders(trainer: pl.Trainer) -> None:
    """Lets loaders that exist before the loops are restored be made anew.

    ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` makes them; the state of loaders in the
    checkpoint is then never given to any.
    """
    trainer.fit_loop._combined_loader = None


def is_epoch_finished(trainer: pl.Trainer) -> bool:
    """Whether the last batch that was trained, perhaps before a resume, was the last one of its epoch."""
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


def count_epoch_start(trainer: pl.Trainer) -> None:
    """Counts the start of an epoch where Lightning left it out.

    After a resume from the last batch of an epoch it does, and every later checkpoint of the middle of an epoch then
    says that no epoch has begun: a second resume repeats batches.
    """
    progress = trainer.fit_loop.epoch_progress
    if progress.current.ready == progress.current.processed:  # type: ignore[attr-defined]
        progress.increment_ready()
        progress.increment_started()


def delay_static_graph_again(strategy: DDPStrategy) -> None:
    """Lets a freshly wrapped module with a static graph start as the first one did.

    With manual optimization Lightning puts off the reducer's first pass, and does so once only; without it the ranks
    silently come apart.
    """
    strategy._pl_static_graph_delay_done = False


def epoch_of_samplers(trainer: pl.Trainer) -> int:
    """The epoch that Lightning is about to give to ``set_epoch``.

    While loaders are made on resume ``trainer.current_epoch`` still lags behind it.
    """
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
