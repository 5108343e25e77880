"""The base of every tip: its events, its place among the others, what it cannot stand beside."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_tips.core.distributed import check_ranks_agree, debugging
from lightning_tips.core.events import Event, EventValue
from lightning_tips.core.loggers import log_numbers
from lightning_tips.core.messages import say
from lightning_tips.core.tables import event_table, plan_table


class ActsOn(IntEnum):
    """What a tip changes. Where several act at the same moment, they do so in this order.

    A network must have its final shape before one decides which of its parameters train, and these must be known
    before an optimizer is built on them.
    """

    NETWORK = 10
    TRAINABLE = 20
    OPTIMIZER = 30
    LOSS = 40
    DATA = 50


class Tip:
    """What all tips share, whichever Lightning object they are mixed into: callback, DataModule or module.

    Subclasses set :attr:`tip` and :attr:`acts_on` and call :meth:`record` for each thing they do.
    """

    tip: ClassVar[str]
    """Short name in events, tables and metric names; by custom the name of the room."""
    acts_on: ClassVar[ActsOn]
    """Decides the order among tips."""

    _events: list[Event]

    @property
    def events(self) -> list[Event]:
        """What this tip did in the current run, oldest first. A resumed run knows what happened before it."""
        if not hasattr(self, "_events"):  # a mixin's __init__ is not always called
            self._events = []
        return self._events

    def describe(self) -> str:
        """One line for the table at fit start: what this tip will do, with its parameters."""
        return ""

    def outlook(self) -> str:
        """One line for the table at fit end when nothing happened: what the tip waited for."""
        return "nothing to do"

    def conflict_with(self, other: object) -> str | None:
        """Says why this tip cannot work beside ``other`` (a callback, DataModule or module), or ``None``."""
        return None

    def record(self, trainer: pl.Trainer, what: str, **details: EventValue) -> Event:
        """Records an event: remembered in checkpoints, printed on rank 0, logged to every logger.

        Call it on all ranks, after the change is complete. With ``LIGHTNING_TIPS_DEBUG=1`` in the environment it also
        checks that the parameters are the same on all ranks.

        Args:
            trainer: The trainer of the running fit.
            what: A few words, for example ``"Adam -> SGD"``.
            **details: Numbers and short strings.

        Returns:
            The event.

        Raises:
            RuntimeError: In debug mode, when ranks have come apart.
        """
        event = Event(self.tip, what, trainer.global_step, trainer.current_epoch, details)
        self.events.append(event)
        say(trainer, str(event))
        log_numbers(trainer, {f"tips/{self.tip}": 1.0} | {f"tips/{self.tip}/{k}": v for k, v in event.numbers.items()})
        if debugging():
            check_ranks_agree(trainer, trainer.lightning_module, after=str(event))
        return event


class TipCallback(Tip, pl.Callback):
    """A tip that is a Lightning callback.

    It puts the tips of the trainer in order at ``setup``, refuses combinations that cannot work, starts afresh when a
    new run begins, keeps its events in checkpoints, and shows one table for all tips at fit start and one at fit end.
    Subclasses that override a hook used here call ``super()``.
    """

    _started_epoch = -1
    _stage = "fit"

    def reset(self) -> None:
        """Forgets the last run. Called when a run starts at step 0, before a checkpoint is loaded."""
        self.events.clear()

    def start_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where a tip acts: before the first batch of every training epoch, once, after the last one's validation."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Puts the tips in order and checks that they go together."""
        self._stage = stage
        if stage == "fit":
            self._started_epoch = -1
            if trainer.global_step == 0:
                self.reset()
            arrange_tips(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the epoch."""
        self._started_epoch = trainer.current_epoch
        self.start_epoch(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts an epoch whose start Lightning skipped.

        Lightning resumes from a checkpoint of the last batch of an epoch with the first batch of the next, without
        ``on_train_epoch_start`` (and without the validation between them, which is lost).
        """
        if batch_idx == 0 and self._started_epoch != trainer.current_epoch:
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first tip shows the table of what all will do."""
        if find_tips(trainer)[0] is self:
            plans = [(type(tip).__name__, tip.describe()) for tip in find_tips(trainer)]
            say(trainer, plan_table(plans, pl_module))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first tip shows the table of what all did."""
        if find_tips(trainer)[0] is self:
            say(trainer, event_table([(type(tip).__name__, tip.events, tip.outlook()) for tip in find_tips(trainer)]))

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint. Subclasses add their own keys to it."""
        return {"events": [event.to_dict() for event in self.events]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`, in fit; subclasses take up their keys in :meth:`restore`.

        Lightning restores callbacks for validate, test and predict too, from a checkpoint of whatever time. A tip that
        goes on training later must not forget what it did since, so that is passed over.

        Raises:
            MisconfigurationException: If the state is not what this class writes.
        """
        if self._stage != "fit":
            return
        try:
            self._events = [Event.from_dict(event) for event in state_dict["events"]]
            self.restore(state_dict)
        except (KeyError, TypeError, ValueError) as error:
            raise MisconfigurationException(
                f"The checkpoint's state of {type(self).__name__} is damaged or of another version ({error!r}). Resume"
                " from an earlier checkpoint; to start from its weights alone, load them into the module and call fit"
                " without ckpt_path."
            ) from error

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what the subclass put into :meth:`state_dict`; may be called any number of times."""


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """``trainer.callbacks``, which Lightning sets without declaring its type."""
    return trainer.callbacks  # type: ignore[attr-defined]


def find_tips(trainer: pl.Trainer) -> list[Tip]:
    """The trainer's tips in the order in which they act: callbacks, then DataModule and module when they are tips."""
    objects: list[object] = [*callbacks_of(trainer), getattr(trainer, "datamodule", None), trainer.lightning_module]
    return [o for o in objects if isinstance(o, Tip)]


def arrange_tips(trainer: pl.Trainer) -> None:
    """Sorts the trainer's tips by :class:`ActsOn` and refuses combinations that cannot work.

    Only tips change places, among each other; equal ones keep the order in which they were given. May be called
    again and again.

    Raises:
        MisconfigurationException: If two of them cannot work together.
    """
    callbacks = callbacks_of(trainer)
    ordered = iter(sorted((c for c in callbacks if isinstance(c, TipCallback)), key=lambda tip: tip.acts_on))
    # A new list, because Lightning is walking through the old one while it calls `setup`.
    trainer.callbacks = [  # type: ignore[attr-defined]
        next(ordered) if isinstance(c, TipCallback) else c for c in callbacks
    ]

    others = [*callbacks_of(trainer), getattr(trainer, "datamodule", None), trainer.lightning_module]
    for tip in find_tips(trainer):
        for other in others:
            if other is not tip and (reason := tip.conflict_with(other)):
                raise MisconfigurationException(
                    f"{type(tip).__name__} and {type(other).__name__} cannot work together: {reason}"
                )
