"""Tips that are mixed into a DataModule."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_tips.core.tip import TipCallback, callbacks_of


class TipMixin:
    """Base of the mixins for a LightningDataModule: brings the tip's callback to whatever trainer it meets.

    A method that a mixin overrides is hidden by the user's own (``class MyData(SomeMixin, LightningDataModule)`` with
    a ``train_dataloader``), and a DataModule has no hook for most of what a run goes through. So the work is done by a
    :class:`TipCallback`, which anybody can also give to the Trainer; a mixin only makes it and calls :meth:`bring` in
    its ``__init__``. Its arguments need names that no other mixin has: of two equal ones only the first is reached.

    Example:
        >>> from lightning.pytorch import LightningDataModule
        >>> from lightning_tips.core import ActsOn
        >>> class HelloTip(TipCallback):
        ...     tip, acts_on = "hello", ActsOn.DATA
        >>> class HelloMixin(TipMixin):
        ...     def __init__(self, *args, **kwargs):
        ...         super().__init__(*args, **kwargs)
        ...         self.bring(HelloTip())
        >>> class MyData(HelloMixin, LightningDataModule):
        ...     pass
        >>> MyData().tips[0].tip
        'hello'
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._tips: list[TipCallback] = []
        super().__init__(*args, **kwargs)

    @property
    def tips(self) -> list[TipCallback]:
        """The callbacks that this DataModule brings."""
        return self._tips

    def bring(self, tip: TipCallback) -> None:
        """Has ``tip`` join the callbacks of every trainer that this DataModule is used with."""
        tip.brought_by = self
        self._tips.append(tip)

    @property
    def trainer(self) -> pl.Trainer | None:
        """The trainer, which Lightning sets before it calls the first hook."""
        return self.__dict__.get("_trainer")

    @trainer.setter
    def trainer(self, trainer: pl.Trainer | None) -> None:
        self.__dict__["_trainer"] = trainer
        if trainer is None:
            return
        if not hasattr(self, "_tips"):
            raise MisconfigurationException(
                f"{type(self).__name__} is a tip that was not set up: call super().__init__() in its __init__."
            )
        callbacks = callbacks_of(trainer)
        for tip in self._tips:
            if tip not in callbacks:  # before the checkpoints, which come last
                where = next((i for i, c in enumerate(callbacks) if isinstance(c, Checkpoint)), len(callbacks))
                callbacks.insert(where, tip)
