"""Scores of a network that has changed since: nobody keeps, stops or slows down by them until they are measured again.

Beside `lightning_private.py` and `lightning_private_members.py` the place of private attributes of Lightning: those of
ModelCheckpoint and EarlyStopping. `tests/test_lightning_private.py` looks at them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_tips.core.tip import callbacks_of

Names = Callable[[], set[str]]


class OldScores:
    """The metrics that were measured on another network than the one that is there now.

    ``trainer.callback_metrics`` goes on holding them until somebody logs them again, which may be epochs later. Until
    then ModelCheckpoint keeps no file by them, and writes ``nan`` for them into names; EarlyStopping does not look; and
    ReduceLROnPlateau does not step. A ModelCheckpoint that saves by steps or by time saves once when they are there.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._take_back: list[Callable[[], None]] = []
        self.forget()

    def forget(self) -> None:
        """No metric is old."""
        self._old: dict[str, Tensor | None] = {}  # as it was then; None where a resumed run has none yet

    def begin(self, trainer: pl.Trainer) -> None:
        """The network has just changed: all that was measured until now is old."""
        still = {name: self._old[name] for name in self.names()}
        self._old = still | dict(trainer.callback_metrics)
        self.attach(trainer)

    def attach(self, trainer: pl.Trainer) -> None:
        """Has everybody look whether a metric is old, if any is; at the start of a resumed fit, too."""
        self._trainer = trainer
        if not self._old:
            return
        names = self.names()
        for callback in callbacks_of(trainer):
            if isinstance(callback, ModelCheckpoint) and callback.monitor in names and not callback.every_n_epochs:
                callback._defer_save_until_validation = True
        if self._take_back:
            return
        for callback in callbacks_of(trainer):
            if isinstance(callback, ModelCheckpoint):
                self._replace(callback, "_monitor_candidates", _candidates)
                self._replace(callback, "_save_topk_checkpoint", _save_topk)
                self._replace(callback, "on_train_epoch_end", _save_what_is_due)
            elif isinstance(callback, EarlyStopping):
                self._replace(callback, "_should_skip_check", _skip)
        if any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs):
            self._replace(trainer.lightning_module, "lr_scheduler_step", _step_plateau)

    def names(self) -> set[str]:
        """Of the metrics that are old."""
        if self._trainer is None:
            return set(self._old)
        now = self._trainer.callback_metrics
        # What is logged anew is another tensor, even where its value is the same.
        return {name for name, value in self._old.items() if now.get(name) is value}

    def release(self) -> None:
        """Leaves everybody as they were found."""
        self._old = dict.fromkeys(self.names())
        self._trainer = None
        while self._take_back:
            self._take_back.pop()()

    def state_dict(self) -> list[str]:
        """Plain data for a checkpoint, which holds no metrics."""
        return sorted(self.names())

    def load_state_dict(self, state: Iterable[str]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._old = dict.fromkeys(state)

    def _replace(self, owner: Any, name: str, make: Callable[[Any, Any, Names], Any]) -> None:
        """Puts what ``make`` makes of a method in its place, on the instance; once, however many tips ask for it."""
        before = vars(owner).get(name)
        asked: list[Names] | None = getattr(before, "asked", None)
        if asked is None:
            asked = []
            method = make(owner, getattr(owner, name), _together(asked))
            method.asked, method.before = asked, before
            vars(owner)[name] = method
        asked.append(self.names)

        def take_back() -> None:  # in whatever order
            asked.remove(self.names)
            method = vars(owner).get(name)
            if not asked and getattr(method, "asked", None) is asked:
                vars(owner).pop(name)
                if method.before is not None:
                    vars(owner)[name] = method.before

        self._take_back.append(take_back)


def _together(asked: list[Names]) -> Names:
    return lambda: set().union(*(names() for names in asked))


def _candidates(callback: ModelCheckpoint, original: Any, old: Names) -> Any:
    """What files are named by, without the values that are old."""

    def candidates(trainer: pl.Trainer) -> dict[str, Tensor]:
        unknown = dict.fromkeys(old() - {"epoch", "step"}, torch.tensor(float("nan"), device="cpu"))
        return original(trainer) | unknown

    return candidates


def _save_topk(callback: ModelCheckpoint, original: Any, old: Names) -> Any:
    """Keeps no file under an old score; ``last.ckpt``, which has none, is written all the same."""

    def save(trainer: pl.Trainer, candidates: dict[str, Tensor]) -> None:
        if callback.monitor not in old():
            original(trainer, candidates)
        elif callback.save_last is True:
            callback._last_global_step_saved = trainer.global_step  # else it would not be: it goes with the others

    return save


def _save_what_is_due(callback: ModelCheckpoint, original: Any, old: Names) -> Any:
    """What Lightning does after a validation for a save that waits for it, also where it saves at an epoch's end."""

    def on_train_epoch_end(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        original(trainer, pl_module)
        waits = callback._defer_save_until_validation and not callback.every_n_epochs
        if waits and callback._should_save_on_train_epoch_end(trainer):
            candidates = callback._monitor_candidates(trainer)
            if callback.monitor in candidates and callback.monitor not in old():
                callback._save_topk_checkpoint(trainer, candidates)
                callback._save_last_checkpoint(trainer, candidates)
                callback._defer_save_until_validation = False

    return on_train_epoch_end


def _skip(callback: EarlyStopping, original: Any, old: Names) -> Any:
    return lambda trainer: original(trainer) or callback.monitor in old()


def _step_plateau(module: pl.LightningModule, original: Any, old: Names) -> Any:
    def lr_scheduler_step(scheduler: Any, metric: Any) -> None:
        configs = module.trainer.lr_scheduler_configs
        monitor = next((config.monitor for config in configs if config.scheduler is scheduler), None)
        if not (isinstance(scheduler, ReduceLROnPlateau) and monitor in old()):
            original(scheduler, metric)

    return lr_scheduler_step
