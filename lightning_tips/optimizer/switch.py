"""From one optimizer to another in the middle of training, without Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn, zeros
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_tips.core.events import EventValue
from lightning_tips.core.optimizers import WeightDecay, decay_is_decoupled, group_rates, rebuild_optimizer
from lightning_tips.core.schedulers import move_schedulers, note_full_rates


@dataclass(frozen=True)
class Switch:
    """What :func:`switch_optimizer` made.

    Attributes:
        optimizer: The new optimizer.
        schedulers: Its schedulers.
        dropped: Class names of old schedulers that could not be taken along.
        details: The switch in numbers and words: ``lr``, ``from_lr``, and where there is one to tell of,
            ``weight_decay`` and ``schedulers``. ``lr`` is the rate of the first step or, where there is a new
            scheduler, the full rate that it is given.
    """

    optimizer: Optimizer
    schedulers: list[LRSchedulerConfig]
    dropped: list[str]
    details: dict[str, EventValue]

    @property
    def full_rate(self) -> float:
        """The rate of the fastest group that the schedule is reckoned from."""
        return max(group_rates(self.optimizer))

    @property
    def share(self) -> float:
        """Which share of its full rate the optimizer starts with, because an old schedule goes on."""
        return float(self.details["lr"]) / self.full_rate if self.full_rate else 1.0


def switch_optimizer(
    old: Optimizer,
    factory: Callable[[Iterable[Any]], Optimizer],
    lr: float | None = None,
    schedulers: Sequence[LRSchedulerConfig] = (),
    new_scheduler: Callable[[Optimizer], Any] | None = None,
    interval: str = "epoch",
    monitor: str = "val_loss",
    weight_decay: WeightDecay = "map",
) -> Switch:
    """Makes the optimizer that takes over from ``old``, and the schedulers that go with it.

    Nothing of ``old`` changes. Parameter groups survive with their relative rates and per-group options
    (:func:`lightning_tips.core.optimizers.rebuild_optimizer`).

    Args:
        old: The optimizer that has trained so far.
        factory: Makes the new optimizer from parameter groups, for example
            ``lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)``.
        lr: Full rate of the group with the largest rate; ``None`` takes what ``factory`` sets. Old schedulers that go
            on apply the share of it to which they have come down.
        schedulers: The schedulers in use, as Lightning's configs. Those of ``old`` are copied onto the new optimizer
            and go on from where they stand, unless ``new_scheduler`` replaces them.
        new_scheduler: Makes one scheduler from the new optimizer.
        interval: ``"epoch"`` or ``"step"``: when the new scheduler steps.
        monitor: Metric for a new ``ReduceLROnPlateau`` that names none itself.
        weight_decay: ``"map"``, ``"keep"`` or ``"optimizer"``; see ``rebuild_optimizer``.

    Raises:
        MisconfigurationException: If ``factory`` cannot make an optimizer on these parameters.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> adam = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
        >>> switch = switch_optimizer(adam, lambda groups: torch.optim.SGD(groups, momentum=0.9), lr=0.1)
        >>> switch.details["weight_decay"]  # one step shrinks the weights as much as before
        '0.01 decoupled -> 1e-05 L2'
    """
    new = rebuild_optimizer(factory, old, lr, weight_decay)
    details: dict[str, EventValue] = {
        "lr": max(float(group["lr"]) for group in new.param_groups),
        "from_lr": max(float(group["lr"]) for group in old.param_groups),
    }
    if (decay := _decay_in_words(old, new)) is not None:
        details["weight_decay"] = decay

    if new_scheduler is not None:
        scheduler = new_scheduler(new)
        config = LRSchedulerConfig(
            scheduler,
            interval=interval,
            reduce_on_plateau=isinstance(scheduler, ReduceLROnPlateau),
            monitor=getattr(scheduler, "monitor", monitor),
        )
        note_full_rates([config])
        details["schedulers"] = f"new {type(scheduler).__name__}"
        return Switch(new, [config], [], details)

    moved, dropped = move_schedulers(schedulers, old, new)
    words = [f"{type(config.scheduler).__name__} goes on" for config in moved] + [f"{d} dropped" for d in dropped]
    if words:
        details["schedulers"] = ", ".join(words)
    details["lr"] = max(float(group["lr"]) for group in new.param_groups)
    return Switch(new, moved, dropped, details)


def _decay_in_words(old: Optimizer, new: Optimizer) -> str | None:
    def words(optimizer: Optimizer) -> str:
        group = max(optimizer.param_groups, key=lambda group: float(group.get("weight_decay", 0.0)))
        kind = "decoupled" if decay_is_decoupled(optimizer, group) else "L2"
        return f"{float(group.get('weight_decay', 0.0)):.3g} {kind}"

    before, after = words(old), words(new)
    told = [before, after, f"{float(new.defaults.get('weight_decay', 0.0)):.3g} "]  # a default put aside is a choice
    return None if all(text.startswith("0 ") for text in told) else f"{before} -> {after}"


def is_sgd(optimizer: Optimizer) -> bool:
    """Whether an optimizer is of the kind that the SWATS projection finds a rate for."""
    return isinstance(optimizer, SGD) or "SGD" in type(optimizer).__name__.upper()


def target_name(factory: Callable[[Iterable[Any]], Optimizer]) -> str:
    """What a factory makes, in words that are the same in every process; empty where it refuses a small matrix."""
    try:
        optimizer = factory([{"params": [nn.Parameter(zeros(1, 1))]}])
        options = {key: optimizer.defaults[key] for key in ("lr", "momentum") if key in optimizer.defaults}
    except Exception:  # the parameters of the module may fare better; on_fit_start tries them
        return ""
    return f"{type(optimizer).__name__}{options}"
