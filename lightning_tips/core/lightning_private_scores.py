"""Scores of a network that has changed since: nobody keeps, stops or slows down by them until they are measured again.

Beside `lightning_private.py` and `lightning_private_members.py` the place of private attributes of Lightning: those of
ModelCheckpoint and EarlyStopping. `tests/test_lightning_private.py` looks at them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_tips.core.tip import callbacks_of


class OldScores:
    """The metrics that were measured on another network than the one that is there now.

    ``trainer.callback_metrics`` goes on holding them until somebody logs them again, which may be epochs later. Until
    then ModelCheckpoint keeps no file by them, and writes ``nan`` for them into names; EarlyStopping does not look; and
    ReduceLROnPlateau does not step. A ModelCheckpoint that saves by steps or by time saves once when they are there.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._guards: list[_Guard] = []
        self.forget()

    def forget(self) -> None:
        """No metric is old."""
        self._old: dict[str, Tensor | None] = {}  # as it was then; None where a resumed run has none yet
        self._before: set[str] = set()  # logged before a resume, which brings none of them back
        self.due: set[str] = set()  # keys of the ModelCheckpoints that save once when their metric is measured

    def begin(self, trainer: pl.Trainer) -> None:
        """The network has just changed: all that was measured until now is old."""
        self._old = dict.fromkeys(self._before) | dict(trainer.callback_metrics)
        self.due |= {
            callback.state_key
            for callback in callbacks_of(trainer)
            if isinstance(callback, ModelCheckpoint) and callback.monitor in self._old and _saves_between(callback)
        }
        self.attach(trainer)

    def attach(self, trainer: pl.Trainer) -> None:
        """Has everybody look whether a metric is old, if any is; at the start of a resumed fit, too."""
        self._trainer = trainer
        if not self._old and not self.due:
            return
        for callback in callbacks_of(trainer):
            if isinstance(callback, ModelCheckpoint):
                self._put(_Candidates, callback, "_monitor_candidates")
                self._put(_SaveTopK, callback, "_save_topk_checkpoint")
                self._put(_SaveWhatIsDue, callback, "on_validation_end")
                self._put(_SaveWhatIsDue, callback, "on_train_epoch_end")
            elif isinstance(callback, EarlyStopping):
                self._put(_SkipCheck, callback, "_should_skip_check")
        # Whether there is a ReduceLROnPlateau or not: one may come with another optimizer, at any step.
        self._put(_StepScheduler, trainer.lightning_module, "lr_scheduler_step")

    def names(self) -> set[str]:
        """Of the metrics that are old."""
        if self._trainer is None:
            return set(self._old)
        now = self._trainer.callback_metrics
        # What is logged anew is another tensor, even where its value is the same.
        return {name for name, value in self._old.items() if now.get(name) is value}

    def release(self) -> None:
        """Leaves everybody as they were found."""
        self.load_state_dict(self.state_dict())  # a fit that goes on from here begins without metrics, too
        self._trainer = None
        while self._guards:
            self._guards.pop().leave(self)

    def state_dict(self) -> dict[str, list[str]]:
        """Plain data for a checkpoint, which holds no metrics."""
        logged = set() if self._trainer is None else set(self._trainer.callback_metrics)
        return {"old": sorted(self.names()), "logged": sorted(self._before | logged), "due": sorted(self.due)}

    def load_state_dict(self, state: Mapping[str, Sequence[str]]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._old = dict.fromkeys(state["old"])
        self._before = set(state["logged"])
        self.due = set(state["due"])

    def _put(self, kind: type[_Guard], owner: Any, name: str) -> None:
        """Puts a guard in the place of a method, on the instance; once, however many tips ask for it."""
        if any(guard.owner is owner and guard.name == name for guard in self._guards):
            return
        guard = vars(owner).get(name)
        if not isinstance(guard, _Guard):
            guard = vars(owner)[name] = kind(owner, name, guard)
        guard.asked.append(self)
        self._guards.append(guard)


def _saves_between(callback: ModelCheckpoint) -> bool:
    """Whether it saves by steps or by time, so that its next turn may be long after the metric is measured."""
    by_steps = callback._every_n_train_steps >= 1 or callback._train_time_interval is not None
    return by_steps and callback.save_top_k != 0


@dataclass(eq=False)
class _Guard:
    """What stands in the place of a method, on the instance. That of a deep copy acts on the copy."""

    owner: Any
    name: str
    before: Any  # what stood there, on the instance, if anything did
    asked: list[OldScores] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Guard:
        owner, before = copy.deepcopy((self.owner, self.before), memo)
        return type(self)(owner, self.name, before, self.asked)  # the same scores: they end for both

    @property
    def original(self) -> Any:
        return partial(getattr(type(self.owner), self.name), self.owner) if self.before is None else self.before

    def old(self) -> set[str]:
        return set().union(*(scores.names() for scores in self.asked))

    def leave(self, scores: OldScores) -> None:
        """One of those who asked does no longer; they come and go in whatever order."""
        self.asked.remove(scores)
        if not self.asked and vars(self.owner).get(self.name) is self:
            del vars(self.owner)[self.name]
            if self.before is not None:
                vars(self.owner)[self.name] = self.before


class _Candidates(_Guard):
    """What files are named by, without the values that are old."""

    def __call__(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        unknown = dict.fromkeys(self.old() - {"epoch", "step"}, torch.tensor(float("nan"), device="cpu"))
        return self.original(trainer) | unknown


class _SaveTopK(_Guard):
    """Keeps no file under an old score; ``last.ckpt``, which has none, is written all the same."""

    def __call__(self, trainer: pl.Trainer, candidates: dict[str, Tensor]) -> None:
        callback = self.owner
        if callback.monitor not in self.old():
            for scores in self.asked:  # before it saves: a run that resumes from the file does not owe it any more
                scores.due.discard(callback.state_key)
            self.original(trainer, candidates)
        elif callback.save_last is True and callback.save_top_k != 0:
            callback._last_global_step_saved = trainer.global_step  # else it would not be: it goes with the others


class _SaveWhatIsDue(_Guard):
    """Saves what is due as soon as the metric is measured, at the moment where the ModelCheckpoint saves."""

    def __call__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callback = self.owner
        self.original(trainer, pl_module)
        if not any(callback.state_key in scores.due for scores in self.asked):
            return
        if self.name == "on_validation_end" and callback._should_save_on_train_epoch_end(trainer):
            return
        candidates = callback._monitor_candidates(trainer)
        if callback.monitor in candidates and callback.monitor not in self.old():
            # Also where last.ckpt has just been written, which counts as a save of this step.
            callback._save_topk_checkpoint(trainer, candidates)
            callback._save_last_checkpoint(trainer, candidates)


class _SkipCheck(_Guard):
    """Has EarlyStopping not look at an old score."""

    def __call__(self, trainer: pl.Trainer) -> bool:
        return self.original(trainer) or self.owner.monitor in self.old()


class _StepScheduler(_Guard):
    """Steps no ReduceLROnPlateau by an old score."""

    def __call__(self, scheduler: Any, metric: Any) -> None:
        configs = self.owner.trainer.lr_scheduler_configs
        monitor = next((config.monitor for config in configs if config.scheduler is scheduler), None)
        if not (isinstance(scheduler, ReduceLROnPlateau) and monitor in self.old()):
            self.original(scheduler, metric)
