"""The moment of a switch in a Trainer: what a trigger watches, and whether the time has come."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_tips.core import Monitor, agree
from lightning_tips.optimizer.swats import SettledTrigger, SwatsProjection
from lightning_tips.optimizer.triggers import FluctuationTrigger, MetricTrigger, PlateauTrigger

__all__ = ["Moment"]


class Moment:
    """Says when `OptimizerSwitchCallback` switches. The callback forwards the hooks of the same names.

    Args:
        trigger: Of the callback, as all that follow.
        at: For ``"epoch"`` and ``"step"``.
        min_epochs: No switch before so many epochs are over.
        metric: Where the monitored metric comes from.
        stall: Arguments of `MetricTrigger`.
        tolerance: For ``"swats"``.
        projection: What ``"swats"`` looks at.

    Attributes:
        stall: For ``"plateau"`` and ``"fluctuation"``: what decides on the metric; else ``None``.
        pending: Whether that has decided, so that the switch is due at the start of the next epoch.
    """

    def __init__(
        self,
        trigger: str,
        at: int | None,
        min_epochs: int,
        metric: Monitor,
        stall: dict[str, Any],
        tolerance: float,
        projection: SwatsProjection | None,
    ) -> None:
        self.trigger, self.at, self.min_epochs = trigger, at or 0, min_epochs
        # What decides: exactly one of these, or `at`.
        self.stall: MetricTrigger | None = None
        self._settled = SettledTrigger(tolerance) if trigger == "swats" else None
        if trigger in ("plateau", "fluctuation"):
            kind = PlateauTrigger if trigger == "plateau" else FluctuationTrigger
            self.stall = kind(min_epochs=min_epochs, **stall)
        self._metric, self._projection = metric, projection
        self.pending = False

    def describe(self) -> str:
        """In words."""
        metric, patience = self._metric.metric, self.stall.patience if self.stall is not None else 0
        return {
            "plateau": f"when {metric} has not improved for {patience} validations",
            "fluctuation": f"when the trend of {metric} drowns in its fluctuation",
            "swats": "when the SWATS projection has settled",
            "epoch": f"after {self.at} epochs",
            "step": f"after {self.at} steps",
        }[self.trigger]

    @property
    def parts(self) -> dict[str, Any]:
        """What has a state of its own, by its name in checkpoints."""
        parts = {
            "metric": self._metric,
            "stall": self.stall,
            "settled": self._settled,
            "projection": self._projection,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def reset(self) -> None:
        """Forgets the last run."""
        self.pending = False
        for part in self.parts.values():
            part.reset()

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"pending": self.pending, "parts": {name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`."""
        self.pending = bool(state["pending"])
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])

    # ---- the metric

    def on_train_start(self, trainer: pl.Trainer) -> None:
        """Refuses a metric that cannot come."""
        if self.stall is not None:
            self._metric.on_train_start(trainer)

    def on_validation_start(self, trainer: pl.Trainer) -> None:
        """The metric is looked for before and after validation."""
        self._metric.on_validation_start(trainer)

    def on_validation_end(self, trainer: pl.Trainer, armed: bool) -> None:
        """Decides, if validation logs the metric and it is this switch's turn (``armed``)."""
        if self.stall is not None:
            self._decide(trainer, self._metric.on_validation_end(trainer), armed)

    def on_train_epoch_end(self, trainer: pl.Trainer, armed: bool) -> None:
        """Decides, if training logs the metric and it is this switch's turn (``armed``)."""
        if self.stall is not None:
            self._decide(trainer, self._metric.on_train_epoch_end(trainer), armed)

    def _decide(self, trainer: pl.Trainer, value: float | None, armed: bool) -> None:
        assert self.stall is not None
        if value is not None and armed and self.stall.update(value, trainer.current_epoch):
            self.pending = True

    def on_train_epoch_start(self, trainer: pl.Trainer) -> None:
        """Raises when a metric that is waited for did not come."""
        if self.stall is not None:
            self._metric.on_train_epoch_start(trainer)

    # ---- now?

    def is_due_at_epoch(self, trainer: pl.Trainer) -> bool:
        """Whether to switch at the start of this epoch."""
        return self.pending or (self.trigger == "epoch" and trainer.current_epoch >= self.at)

    def is_due_at_step(self, trainer: pl.Trainer) -> bool:
        """Whether to switch before this step."""
        if self.trigger == "step":
            return trainer.global_step >= self.at
        if self._settled is None or self._projection is None or self._settled.looks == self._projection.looks:
            return False  # nothing new; and all ranks ask each other at the same steps
        return agree(trainer, self._settled.update(self._projection)) and trainer.current_epoch >= self.min_epochs
