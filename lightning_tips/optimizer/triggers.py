"""Triggers that watch a validation metric, one value per validation, and say when to switch the optimizer.

The rule in three sentences. Fit a straight line to the last few values, once to all of them and once without the
value that lies farthest on the bad side of the line, so that one bad validation is not enough. The metric still
improves if either line gains, over ``patience`` validations, more than ``min_delta`` plus what noise could feign; if
every value is better than the one before, nothing is put down to noise. Otherwise the trigger fires.

"Best value so far", the rule of early stopping, is not used: among k equally good noisy values the last one is the
best with probability 1/k, so lucky records hide a stall; in `benchmarks/optimizer/triggers.py` it catches 6 of 10 in
time. It raises fewer false alarms on very noisy curves; the answer to those here is a larger ``patience``.

Pure Python: no torch and no Lightning, so the triggers serve any training loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

__all__ = ["FluctuationTrigger", "MetricTrigger", "PlateauTrigger"]


class _Line(NamedTuple):
    """A straight line through some values, seen as progress: `gain` is positive while the values fall."""

    gain: float  # fall per validation, in units of the metric
    spread: float  # standard deviation of the values around the line, in units of the metric
    error: float  # standard error of `gain`, in units of the metric per validation
    outlier: int  # position of the value farthest above the line


def _fit(times: Sequence[float], values: Sequence[float]) -> _Line:
    """Least-squares line through two or more values; two values leave no spread."""
    shifted = [value - values[0] for value in values]  # equal values become exact zeros: no rounding, no false slope
    mean, middle = sum(shifted) / len(shifted), sum(times) / len(times)
    ticks = [time - middle for time in times]
    weight = sum(tick * tick for tick in ticks)
    slope = sum(tick * value for tick, value in zip(ticks, shifted, strict=True)) / weight
    residuals = [value - mean - slope * tick for tick, value in zip(ticks, shifted, strict=True)]
    spread = math.sqrt(sum(r * r for r in residuals) / (len(values) - 2)) if len(values) > 2 else 0.0
    return _Line(-slope, spread, spread / math.sqrt(weight), residuals.index(max(residuals)))


class MetricTrigger:
    """What both triggers share; a subclass only says how large a gain noise could feign.

    Call `update` once per validation; leave out the sanity check before training. A trigger has no memory of having
    fired: the caller acts on the first True. It decides from its last ``window`` values only.

    Args:
        mode: "min" if a smaller metric is better (a loss), "max" if a larger one is (an accuracy).
        patience: Validations without improvement before the trigger fires, >= 1. A constant metric fires at its
            ``patience + 1``-th value, the first being what the others fail to improve on. Choose it by the noise:
            an improvement is told from noise if, per validation, it is at least 3 standard deviations of the noise
            with 3 (the default), 1.5 to 2 with 5, and 0.75 (fluctuation: 1.5) with 8. Below that it is a stall.
        min_delta: Improvement over ``patience`` validations that is still none, >= 0, in units of the metric.
        cooldown: Finite values that are ignored at the start and after `reset`, >= 0.
        min_epochs: The trigger cannot fire while ``epoch + 1 < min_epochs``, >= 0. Values are watched meanwhile, so
            it may fire at once when epoch number ``min_epochs`` (counted from 1) is validated.
        smoothing: Factor of an exponential moving average with bias correction, in [0, 1); 0 is off. Smoothed values
            lag and hide the noise that the rule measures: raise ``patience`` first.
        noise_margin: Factor, >= 0, on the gain that is put down to noise. 1 is the measured compromise between false
            alarms (rarer below 1) and missed plateaus (rarer above 1); 0 looks at the slope alone.
        window: How many values the line is fitted to, >= 3; None is ``patience + 2``. Until so many values are there
            (but at least ``patience + 1``), the line is fitted to what there is.

    Attributes:
        nan_count: Values skipped since the start or `reset` because they were NaN or infinite. A skipped value counts
            neither as improvement nor as plateau and the call returns False.

    Raises:
        ValueError: An argument is outside its domain.
    """

    def __init__(
        self,
        mode: str = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        cooldown: int = 0,
        min_epochs: int = 1,
        smoothing: float = 0.0,
        noise_margin: float = 1.0,
        window: int | None = None,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f'mode={mode!r}: use "min" for a loss or "max" for an accuracy.')
        if not patience >= 1:
            raise ValueError(f"patience={patience}: use 1 or more validations (3 or more is advised).")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing}: use a factor in [0, 1); 0 switches smoothing off.")
        for name, value in (
            ("min_delta", min_delta),
            ("cooldown", cooldown),
            ("min_epochs", min_epochs),
            ("noise_margin", noise_margin),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: use 0 or a positive number.")
        if window is not None and not window >= 3:
            raise ValueError(f"window={window}: use 3 or more values, or None for patience + 2.")
        self.mode = mode
        self.patience = patience
        self.min_delta = min_delta
        self.cooldown = cooldown
        self.min_epochs = min_epochs
        self.smoothing = smoothing
        self.noise_margin = noise_margin
        self.window = patience + 2 if window is None else window
        self.reset()

    def reset(self) -> None:
        """Forget everything seen; the cooldown and `nan_count` start again."""
        self.nan_count = 0
        self._seen = 0  # finite values, those of the cooldown included
        self._average = 0.0  # moving average with bias correction
        self._values: list[float] = []  # the last `window` smoothed values, turned so that smaller is better

    def update(self, value: float, epoch: int) -> bool:
        """Take the metric of one validation.

        Args:
            value: The metric; NaN and infinite values are skipped and counted.
            epoch: Epoch of this validation, counted from 0 (``trainer.current_epoch``); several validations may share
                one.

        Returns:
            True if the metric does not improve any more.
        """
        value = float(value)  # a 0-dimensional tensor must not get into the state
        if not math.isfinite(value):
            self.nan_count += 1
            return False
        self._seen += 1
        counted = self._seen - self.cooldown
        if counted <= 0:
            return False
        share = (1 - self.smoothing) / (1 - self.smoothing**counted)
        # Written as a correction, so that rounding cannot turn a constant metric into one that improves.
        self._average = self._average + share * (value - self._average) if share < 1 else value
        self._values = [*self._values, self._average if self.mode == "min" else -self._average][-self.window :]
        return counted > self.patience and epoch + 1 >= self.min_epochs and not self._improves()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to decide identically, in plain Python types; arguments are not included."""
        return {
            "seen": self._seen,
            "average": self._average,
            "values": list(self._values),
            "nan_count": self.nan_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict` of a trigger that was made with the same arguments."""
        self._seen = state["seen"]
        self._average = state["average"]
        self._values = list(state["values"])
        self.nan_count = state["nan_count"]

    def _feigned(self, line: _Line) -> float:
        """The gain that noise could feign, in units of the metric per validation."""
        raise NotImplementedError

    def _improves(self) -> bool:
        values, times = self._values, list(range(len(self._values)))
        line = _fit(times, values)
        if all(new < old for old, new in pairwise(values)):
            # A bend is no noise: a smooth curve that only slows down does not lie on its line either.
            return line.gain * self.patience > self.min_delta
        if self._stands_out(line):
            return True
        kept = [time for time in times if time != line.outlier]
        return len(kept) > 2 and self._stands_out(_fit(kept, [values[time] for time in kept]))

    def _stands_out(self, line: _Line) -> bool:
        needed = self.min_delta + self.noise_margin * self._feigned(line) * self.patience
        return line.gain * self.patience > needed


class PlateauTrigger(MetricTrigger):
    """Fires when no improvement can be proved any more: the gain is under 2.25 standard errors.

    A longer patience proves smaller improvements, so it waits longer on a slow, noisy curve. The number lies above the
    square root of 3, which one old value followed by equal ones scores at any window length, and under what two old
    values of a smooth curve score: a curve that stops dead fires after exactly ``patience`` values that do not
    improve, as early stopping would. For the arguments see `MetricTrigger`.
    """

    STANDARD_ERRORS = 2.25

    def _feigned(self, line: _Line) -> float:
        return self.STANDARD_ERRORS * line.error


class FluctuationTrigger(MetricTrigger):
    """Fires when fluctuation drowns the trend: the gain per validation is under 0.8 standard deviations.

    They are the deviations from the line. Unlike `PlateauTrigger` it also fires on a curve that improves surely but
    slowly, however long the window: a longer one only compares more exactly. Keep the window short (10 or less): over
    a long one the bend of an early learning curve passes for fluctuation. For the arguments see `MetricTrigger`.

    At the default window of 5 values the threshold comes close to that of `PlateauTrigger`, so both decide alike.

    Source: the advice to leave Adam for SGD when performance starts to fluctuate, after Keskar & Socher 2017 (arXiv
    1712.07628), whose own criterion is the projected learning rate; the test here is ours.
    """

    DEVIATIONS = 0.8

    def _feigned(self, line: _Line) -> float:
        return self.DEVIATIONS * line.spread
