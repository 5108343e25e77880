"""When to prune and how much: one shot, in equal steps, or in steps that grow smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Shape = Literal["one_shot", "linear", "cubic"]
SHAPES: tuple[str, ...] = get_args(Shape)


@dataclass(frozen=True)
class Schedule:
    """The way to a target, in steps.

    Attributes:
        shape: ``"one_shot"``: all at once. ``"linear"``: equal steps. ``"cubic"``: large steps first, while the
            network has much to spare: 1 - (1 - t)^3 of the way after a share t of the steps (Zhu & Gupta 2017, arXiv
            1710.01878, eq. 1).
        steps: How many, 1 or more; ``"one_shot"`` takes one whatever it says.
        start_epoch: The first step is at the start of this epoch, counted from 0.
        every_n_epochs: Epochs of fine-tuning after each step.
    """

    shape: Shape = "cubic"
    steps: int = 5
    start_epoch: int = 0
    every_n_epochs: int = 1

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"schedule={self.shape!r} is unknown; it is one of {', '.join(SHAPES)}.")
        for name, least in (("steps", 1), ("start_epoch", 0), ("every_n_epochs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {least} or more.")

    @property
    def stride(self) -> float:
        """The share of the steps that one is."""
        return 1.0 if self.shape == "one_shot" else 1.0 / self.steps

    @property
    def last_epoch(self) -> int:
        """The epoch at whose start the last step is, if every step goes well."""
        return self.start_epoch + (round(1 / self.stride) - 1) * self.every_n_epochs

    def progress(self, position: float) -> float:
        """The share of the way that lies behind.

        Args:
            position: Share of the steps taken, in [0, 1].
        """
        position = min(max(position, 0.0), 1.0)
        return 1 - (1 - position) ** 3 if self.shape == "cubic" else position

    def goal(self, target: float, position: float) -> float:
        """What is to be left, as a share of the unpruned network.

        Args:
            target: What is to be left in the end, in (0, 1).
            position: Share of the steps taken, in [0, 1].

        Example:
            >>> [round(Schedule("cubic", steps=4).goal(0.5, t / 4), 3) for t in range(5)]
            [1.0, 0.711, 0.562, 0.508, 0.5]
        """
        return 1 - (1 - target) * self.progress(position)


def steps_until(end_epoch: int, start_epoch: int, every_n_epochs: int) -> int:
    """How many steps there is time for, if the last one is not to come after the start of ``end_epoch``.

    Raises:
        ValueError: If not even the first one fits.
    """
    if end_epoch < start_epoch:
        raise ValueError(f"end_epoch={end_epoch} comes before start_epoch={start_epoch}.")
    return (end_epoch - start_epoch) // every_n_epochs + 1
