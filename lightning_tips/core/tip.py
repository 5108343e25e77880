"""The base of every tip: its events, its place among the others, what it cannot stand beside."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import Self

from lightning_tips.core.dataset_labels import forget_labels
from lightning_tips.core.distributed import check_ranks_agree, debugging
from lightning_tips.core.events import Event, EventValue
from lightning_tips.core.lightning_private import count_epoch_start, member_prefix
from lightning_tips.core.loggers import log_numbers
from lightning_tips.core.messages import say
from lightning_tips.core.tables import event_table, plan_table


class ActsOn(IntEnum):
    """What a tip changes. Where several act at the same moment, they do so in this order.

    A network must have its final shape before one decides which of its parameters train, and these must be known
    before an optimizer is built on them. Samples are mixed into the order that is chosen for those that are there.
    """

    NETWORK = 10
    TRAINABLE = 20
    OPTIMIZER = 30
    LOSS = 40
    DATA = 50
    MORE_DATA = 60


class TipCallback(pl.Callback):
    """The base of every tip.

    It puts the tips of the trainer in order, refuses combinations that cannot work, starts afresh when a new run
    begins, keeps its events in checkpoints, and shows one table for all tips at fit start and one at fit end.

    Subclasses set :attr:`tip` and :attr:`acts_on`, act in :meth:`prepare` and :meth:`start_epoch`, which are called in
    the tips' order, call :meth:`record` for each thing they do, and ``super()`` in every hook that is used here. One
    that may be given twice overrides ``state_key``, by which checkpoints tell the two apart.
    """

    tip: ClassVar[str]
    """Short name in events, tables and metric names; by custom the name of the room."""
    acts_on: ClassVar[ActsOn]
    """Decides the order among tips."""

    events: list[Event]
    """What this tip did in the current run, oldest first. A resumed run knows what happened before it."""
    brought_by: object = None
    """The DataModule that this tip came with (see :class:`~lightning_tips.core.mixin.TipMixin`), or the module, which
    returns it from ``configure_callbacks``. With another DataModule or module it leaves the Trainer."""

    _changes: list[Callable[[], None]]
    _started_epoch = -1
    _stage = "fit"
    _prepared = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Gives each tip its list of events, whatever its ``__init__`` does."""
        self = super().__new__(cls)
        self.events = []
        self._changes = []
        return self

    # ---- what a subclass says and does

    def describe(self) -> str:
        """One line for the table at fit start: what this tip will do, with its parameters."""
        return ""

    def outlook(self) -> str:
        """One line for the table at fit end when nothing happened: what the tip waited for."""
        return "nothing to do"

    def conflict_with(self, other: object) -> str | None:
        """Says why this tip cannot work beside ``other`` (a callback, DataModule or module), or ``None``."""
        return None

    def keeps_shapes(self) -> str | None:
        """Says what this tip holds in the shape of the parameters, as they are at the start, or ``None``.

        A tip that changes shapes cannot work beside it.
        """
        return None

    def keeps_names(self) -> str | None:
        """Says what this tip knows by the names of parameters, as they are at the start, or ``None``.

        A tip that takes whole parameters out of the module cannot work beside it.
        """
        return None

    def reset(self) -> None:
        """Forgets the last run. Called when a run starts at step 0, before a checkpoint is loaded."""
        self.events.clear()

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The start of every fit, before optimizers are made and a checkpoint is loaded: the time for checks."""

    def release(self) -> None:
        """Leaves module, loaders and Trainer as they were found, but for the weights.

        Called at the end of every run, after an error, and once more before the next fit is prepared. What
        :meth:`on_release` was told of is done here; a subclass that holds on to more overrides this.
        """
        while self._changes:
            self._changes.pop()()

    def on_release(self, take_back: Callable[[], None]) -> None:
        """Has :meth:`release` take back a change that this tip has made."""
        self._changes.append(take_back)

    def start_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where a tip acts: before the first batch of every training epoch, once, after the last one's validation."""

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
        member = member_prefix(trainer)
        say(trainer, f"{member.rstrip('/')} {event}".lstrip())
        name = f"{member}tips/{self.tip}"
        log_numbers(trainer, {name: 1.0} | {f"{name}/{k}": v for k, v in event.numbers.items()})
        if debugging():
            check_ranks_agree(trainer, trainer.lightning_module, after=str(event))
        return event

    # ---- Lightning's hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepares all tips, in their order; Lightning calls this in the order in which they were given."""
        self._stage = stage
        if not belongs_to(trainer, self):  # leaves
            trainer.callbacks = [c for c in callbacks_of(trainer) if c is not self]  # type: ignore[attr-defined]
            return
        if stage != "fit":
            return
        if not self._prepared:  # the first one to be called prepares all
            tips = arrange_tips(trainer)
            forget_labels()  # the data may have changed since the last fit
            for tip in tips:
                tip._stage, tip._prepared, tip._started_epoch = stage, True, -1
                if trainer.global_step == 0:
                    tip.reset()
            for tip in tips:
                tip.release()
                tip.prepare(trainer, pl_module)
        self._prepared = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets go of everything; the next fit prepares anew."""
        self._prepared = False
        self.release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets go of everything."""
        self.release()

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
            count_epoch_start(trainer)
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first tip shows the table of what all will do."""
        if find_tips(trainer)[0] is self and not member_prefix(trainer):
            say(trainer, plan_table([(name, tip.describe()) for name, tip in _shown(trainer)], pl_module))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first tip shows the table of what all did."""
        if find_tips(trainer)[0] is self and not member_prefix(trainer):
            say(trainer, event_table([(name, tip.events, tip.outlook()) for name, tip in _shown(trainer)]))

    def parts(self) -> list[tuple[str, TipCallback]]:
        """Tips that act within this one, by name. The tables show them below it."""
        return []

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
            self.events = [Event.from_dict(event) for event in state_dict["events"]]
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


def find_tips(trainer: pl.Trainer) -> list[TipCallback]:
    """The trainer's tips; from the start of a fit on, in the order in which they act."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, TipCallback)]


def _shown(trainer: pl.Trainer) -> list[tuple[str, TipCallback]]:
    """The rows of the tables."""
    return [row for tip in find_tips(trainer) for row in [(type(tip).__name__, tip), *tip.parts()]]


def belongs_to(trainer: pl.Trainer, callback: pl.Callback) -> bool:
    """Whether ``callback`` was given to the trainer, or came with the DataModule or module of the running fit."""
    owner = getattr(callback, "brought_by", None)
    return owner is None or owner is getattr(trainer, "datamodule", None) or owner is trainer.lightning_module


def arrange_tips(trainer: pl.Trainer) -> list[TipCallback]:
    """Sorts the trainer's tips by :class:`ActsOn` and refuses combinations that cannot work.

    Only tips change places, among each other; equal ones keep the order in which they were given. May be called
    again and again.

    Returns:
        The tips in their order.

    Raises:
        MisconfigurationException: If two of them cannot work together.
    """
    datamodule = getattr(trainer, "datamodule", None)
    callbacks = [c for c in callbacks_of(trainer) if belongs_to(trainer, c)]
    ordered = iter(sorted((c for c in callbacks if isinstance(c, TipCallback)), key=lambda tip: tip.acts_on))
    # A new list, because Lightning is walking through the old one while it calls `setup`.
    trainer.callbacks = [  # type: ignore[attr-defined]
        next(ordered) if isinstance(c, TipCallback) else c for c in callbacks
    ]

    tips = find_tips(trainer)
    keys = [tip.state_key for tip in tips]  # Lightning looks at those that were given to the Trainer only
    for tip in tips:
        if keys.count(tip.state_key) > 1:
            raise MisconfigurationException(
                f"There are {keys.count(tip.state_key)} {type(tip).__name__}, and checkpoints cannot tell them apart:"
                f" {tip.state_key!r}. Take one away; its DataModule or module may bring one of its own."
            )
        for other in [*callbacks_of(trainer), datamodule, trainer.lightning_module]:
            if other is not None and other is not tip and (reason := tip.conflict_with(other)):
                raise MisconfigurationException(
                    f"{type(tip).__name__} and {type(other).__name__} cannot work together: {reason}"
                )
    return tips
