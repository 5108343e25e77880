"""Where a plan stands: which phase is on, since when, and whether its time is over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_tips.transfer.schedule import Phase


class Gate:
    """Says when a metric has stopped improving: no new best for ``patience`` values."""

    def __init__(self, mode: str, patience: int, min_delta: float) -> None:
        self.mode, self.patience, self.min_delta = mode, patience, min_delta
        self.best: float | None = None
        self.waited = 0

    def update(self, value: float) -> bool:
        """Takes the next value (one that is not finite counts as no improvement); returns whether to go on."""
        sign = 1.0 if self.mode == "min" else -1.0
        better = self.best is None or sign * (self.best - value) > self.min_delta
        if better and math.isfinite(value):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.best = None if state["best"] is None else float(state["best"])
        self.waited = int(state["waited"])


class Progress:
    """The phase that is on. Plain Python; a callback asks it at the start of each epoch."""

    def __init__(self) -> None:
        self.number = 0
        self.epoch = 0
        """In which the phase began."""
        self.step = 0
        """With which it began."""
        self._pending = False  # its metric has decided
        self._gate: Gate | None = None
        self._gate_state: dict[str, Any] | None = None

    def gate(self, phase: Phase) -> None:
        """Sets up what ends the phase that is on, if that was not done; it goes on from a checkpoint's state."""
        if self._gate is not None:
            return
        self._gate = Gate(phase.mode, phase.patience, phase.min_delta) if phase.monitor else None
        if self._gate is not None and self._gate_state is not None:
            self._gate.load_state_dict(self._gate_state)
        self._gate_state = None

    def decide(self, phases: Sequence[Phase], metric: str, value: float | None) -> None:
        """Takes the next value of a metric."""
        phase = phases[self.number]
        if value is None or self._gate is None or phase.monitor != metric or self.number == len(phases) - 1:
            return
        if self._gate.update(value):
            self._pending = True

    def due(self, phases: Sequence[Phase], epoch: int) -> bool:
        """Whether the next phase is to begin with this epoch."""
        if self.number == len(phases) - 1:
            return False
        phase, following = phases[self.number : self.number + 2]
        over = phase.epochs is not None and epoch >= self.epoch + phase.epochs
        return self._pending or over or (following.start is not None and epoch >= following.start)

    def advance(self, phases: Sequence[Phase], epoch: int, step: int) -> None:
        """Begins the next phase."""
        self.number += 1
        self.epoch, self.step = epoch, step
        self._pending, self._gate, self._gate_state = False, None, None
        self.gate(phases[self.number])

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "phase": self.number,
            "began": [self.epoch, self.step],
            "pending": self._pending,
            "gate": self._gate.state_dict() if self._gate is not None else self._gate_state,
        }

    def load_state_dict(self, state: dict[str, Any], phases: Sequence[Phase] = ()) -> None:
        """The inverse of :meth:`state_dict`; without phases, :meth:`gate` has to be called when they are known."""
        self.number = int(state["phase"])
        self.epoch, self.step = (int(n) for n in state["began"])
        self._pending = bool(state["pending"])
        self._gate, self._gate_state = None, state["gate"]
        if self.number < len(phases):
            self.gate(phases[self.number])
