"""The guard in a Trainer: the metric that it watches, and the way back to the last good network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_tips.core import Monitor, OldScores, wrap_again
from lightning_tips.pruning.fit.finding import NetworkFinder
from lightning_tips.pruning.fit.guard import DropGuard, put_back
from lightning_tips.pruning.fit.surroundings import put_best_back, write_last_again

SMALLEST_STRIDE = 1 / 8  # of the schedule's: below that, smaller steps are not tried any more


class GuardedTip(NetworkFinder):
    """A tip that goes back to the network before its last step, where that has cost too much.

    Args:
        module: See :class:`NetworkFinder`.
        example_inputs: Likewise.
        samples: Likewise.
        sample_megabytes: Likewise.
        monitor: The metric that the guard watches.
        mode: Whether it is to be ``"max"`` or ``"min"``.
        max_drop: How far it may stay from its reference; ``None`` for no guard.
        reference: The unpruned network's metric; by default the last one before the first step.
        on_drop: ``"stop"`` or ``"smaller"`` steps.
        reset_best: Whether checkpoints and early stopping forget the best score at each step, and find it again when
            the network comes back.
    """

    def __init__(
        self,
        module: str | None,
        example_inputs: Any,
        samples: int,
        sample_megabytes: float,
        monitor: str,
        mode: Literal["min", "max"],
        max_drop: float | None,
        reference: float | None,
        on_drop: Literal["stop", "smaller"],
        reset_best: bool,
    ) -> None:
        super().__init__(module, example_inputs, samples, sample_megabytes)
        self.monitor = monitor
        self.mode = mode
        self.on_drop = on_drop
        self.reset_best = reset_best
        self._guard = DropGuard(max_drop, mode, reference) if max_drop is not None else None
        self._metric = Monitor(monitor, type(self).__name__)
        self._scores = OldScores()

    # ---- what a subclass says

    @abstractmethod
    def _take_up(self, progress: Mapping[str, Any]) -> None:
        """Goes on from what was noted beside a snapshot."""

    @abstractmethod
    def _stop(self, trainer: pl.Trainer, what: str, **details: float) -> None:
        """Makes no more steps."""

    # ---- state

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self._scale = 1.0  # of a step
        self._good: dict[str, Any] | None = None  # the network before the last step
        self._metric.reset()
        self._scores.forget()
        if self._guard is not None:
            self._guard.reset()

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return super().state_dict() | {
            "scale": self._scale,
            "good": self._good,
            "metric": self._metric.state_dict(),
            "guard": self._guard.state_dict() if self._guard is not None else None,
            "old_scores": self._scores.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`."""
        super().restore(state)
        self._scale = float(state["scale"])
        self._good = state["good"]
        self._metric.load_state_dict(state["metric"])
        self._scores.load_state_dict(state["old_scores"])
        if self._guard is not None and state["guard"] is not None:
            self._guard.load_state_dict(state["guard"])

    # ---- the metric

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In a resumed run scores may still have to be measured on the network as it is."""
        super().on_train_start(trainer, pl_module)
        self._scores.attach(trainer)

    def release(self) -> None:
        """Leaves those who keep scores as they were found."""
        super().release()
        self._scores.release()

    def take_reference(self, metrics: Mapping[str, float]) -> None:
        """Before a fit: gives the guard the unpruned network's metric, if it has none and ``metrics`` holds it."""
        if self._guard is not None and self._guard.reference is None and self.monitor in metrics:
            self._guard = DropGuard(self._guard.max_drop, self._guard.mode, metrics[self.monitor])

    @property
    def _looks_at_metric(self) -> bool:
        """Whether anything depends on ``monitor``."""
        return self._guard is not None

    @property
    def _waits_for_validation(self) -> bool:
        """Whether the first step waits for a value of the metric."""
        return self._guard is not None and self._guard.reference is None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The metric is looked for before and after validation."""
        if self._looks_at_metric and trainer.state.fn == TrainerFn.FITTING:
            self._metric.on_validation_start(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the metric, if validation logs it."""
        if self._looks_at_metric and trainer.state.fn == TrainerFn.FITTING:
            self._note(self._metric.on_validation_end(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the metric, if it is one of training."""
        if self._looks_at_metric:
            self._note(self._metric.on_train_epoch_end(trainer))

    def _note(self, value: float | None) -> None:
        if self._guard is not None:
            self._guard.update(value)

    # ---- back

    def _go_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule, last: bool = False) -> None:
        """Brings the last good network back."""
        assert self._good is not None
        assert self._guard is not None
        guard, good = self._guard, self._good
        value = guard.value
        anew = put_back(pl_module, trainer.optimizers, good)
        wrap_again(trainer.strategy, pl_module)
        self._take_up(good)
        self._good = None
        self._scores.begin(trainer)
        if self.reset_best:
            put_best_back(trainer, good["best"])
        details: dict[str, Any] = {self.monitor: float("nan") if value is None else value}
        details["reference"] = guard.reference
        guard.value = None
        if anew:
            rank_zero_warn(f"{', '.join(anew)} starts without state: it was not there before the step that is undone.")
        smaller = self._scale / 2
        if self.on_drop == "smaller" and smaller >= SMALLEST_STRIDE and not last:
            self._scale = smaller
            self.record(trainer, "back to the last good network, smaller steps", **details)
        else:
            self._stop(trainer, "back to the last good network, no more steps", **details)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judges the last step."""
        if self._guard is None or self._good is None:
            return
        if self._guard.value is None:
            rank_zero_warn(
                f"{type(self).__name__}: nothing was validated after the last pruning step, so max_drop is not checked"
                " for it."
            )
        elif self._guard.fell:
            self._go_back(trainer, pl_module, last=True)
            write_last_again(trainer)
