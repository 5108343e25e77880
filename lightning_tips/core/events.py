"""Events: what a tip did, when, and with which numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from typing_extensions import Self

EventValue = bool | int | float | str


@dataclass(frozen=True)
class Event:
    """One act of a tip: switched, thawed, pruned ...

    Attributes:
        tip: Short name of the tip, for example ``"optimizer"``.
        what: What happened, in a few words, for example ``"Adam -> SGD"``.
        step: ``trainer.global_step`` at that moment: the act lies before the optimizer step of this number.
        epoch: ``trainer.current_epoch`` at that moment, counted from 0.
        details: Numbers and short strings that explain the act. The numbers also go to the loggers.
    """

    tip: str
    what: str
    step: int
    epoch: int
    details: dict[str, EventValue] = field(default_factory=dict)

    def __str__(self) -> str:
        details = ", ".join(f"{key} {_short(value)}" for key, value in self.details.items())
        return f"[{self.tip}] epoch {self.epoch}, step {self.step}: {self.what}" + (f" ({details})" if details else "")

    @property
    def numbers(self) -> dict[str, float]:
        """The details that a logger can draw as a curve."""
        return {key: float(value) for key, value in self.details.items() if not isinstance(value, str)}

    def to_dict(self) -> dict[str, object]:
        """Plain data, as it goes into a checkpoint that ``torch.load(weights_only=True)`` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, object]) -> Self:
        """The inverse of :meth:`to_dict`."""
        return cls(**data)  # type: ignore[arg-type]


def _short(value: EventValue) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
