"""A logged metric on which a tip decides: where it comes from, and what is wrong with it."""

from __future__ import annotations

import math
import re
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_tips.core.distributed import gather_objects
from lightning_tips.core.messages import did_you_mean

# val_loss, valid/acc, loss.val, valLoss, but not value_loss or interval
_NAMES_VALIDATION = re.compile(r"(?<![a-zA-Z])[vV][aA][lL](id|idation)?(?![a-z])")


class Monitor:
    """Reads one metric once an epoch or validation, the same value on every rank.

    A metric that validation logs is read after each validation (not after the sanity check), any other at the end of
    each training epoch: which of the two it is, is found out at its first appearance. A tip forwards the hooks of the
    same names.

    Args:
        metric: The name under which the module logs it.
        asker: Who decides on it, for messages.
    """

    def __init__(self, metric: str, asker: str) -> None:
        self.metric = metric
        self.asker = asker
        self.reset()

    def reset(self) -> None:
        """Forgets the last run."""
        self._source = "unknown"  # or "validation", "training"
        self._there_before_validation = False
        self._missed = False
        self._validated = False
        self._known: list[str] = []  # what any rank logs, when last asked for

    def on_train_start(self, trainer: pl.Trainer) -> None:
        """Raises when a validation metric is wanted and there is no validation."""
        if self._names_validation and not trainer.enable_validation:
            raise MisconfigurationException(
                f"{self.asker} waits for {self.metric!r}, but no validation runs. Give the Trainer validation data, or"
                " monitor a training metric."
            )

    def on_validation_start(self, trainer: pl.Trainer) -> None:
        """Notes whether the metric is there already: then it is not validation that logs it."""
        self._there_before_validation = self.metric in trainer.callback_metrics

    def on_validation_end(self, trainer: pl.Trainer) -> float | None:
        """The metric, if this validation logged it.

        Raises:
            MisconfigurationException: After the sanity check, so before the first step, when a validation metric has
                a name that is not logged.
        """
        value, was_there = self._on_first_rank(trainer)
        if trainer.sanity_checking:
            if value is None and self._known and self._names_validation:
                raise self._missing()
            return None
        self._validated = True
        if self._source == "unknown" and value is not None and not was_there:
            self._source = "validation"
        return self._checked(trainer, value) if self._source == "validation" else None

    def on_train_epoch_end(self, trainer: pl.Trainer) -> float | None:
        """The metric, if it is one of training."""
        if self._source == "validation":
            return None
        value, _ = self._on_first_rank(trainer)
        if value is not None:
            self._source = "training"
            return self._checked(trainer, value)
        # Validation may come in a later epoch only.
        self._missed = self._validated or not trainer.enable_validation
        return None

    def on_train_epoch_start(self, trainer: pl.Trainer) -> None:
        """Raises when an epoch and a validation passed without the metric; their checkpoint is written."""
        if self._missed and self._source == "unknown":
            raise self._missing()

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"source": self._source}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._source = str(state["source"])

    @property
    def _names_validation(self) -> bool:
        return _NAMES_VALIDATION.search(self.metric) is not None

    def _on_first_rank(self, trainer: pl.Trainer) -> tuple[float | None, bool]:
        """The metric, and whether it was there before validation: what the first rank sees that has the metric.

        All ranks ask, whatever they see themselves: a module may log on rank 0 alone, and rank 0 may have no batch.
        """
        metrics = trainer.callback_metrics
        value = float(metrics[self.metric]) if self.metric in metrics else None
        ranks = gather_objects(trainer, (value, self._there_before_validation, list(metrics)))
        self._known = list(dict.fromkeys(name for _, _, names in ranks for name in names))
        first = next((rank for rank in ranks if rank[0] is not None), ranks[0])
        return first[0], first[1]

    def _checked(self, trainer: pl.Trainer, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            rank_zero_warn(
                f"{self.metric} is {value} in epoch {trainer.current_epoch}; {self.asker} passes over it. If that goes"
                " on, the learning rate is too high or the data has holes."
            )
        return value

    def _missing(self) -> MisconfigurationException:
        return MisconfigurationException(
            f"{self.asker} waits for {self.metric!r}, which nobody logs."
            f" {did_you_mean(self.metric, self._known)} (A metric logged in the module's own"
            " on_train_epoch_end comes too late to be seen.)"
        )
