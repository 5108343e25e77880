"""Learning rate schedulers that follow a parameter group to another optimizer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)
from torch.optim.swa_utils import SWALR

from lightning_tips.core.optimizers import group_rates

# These keep the bounds of their schedule in the parameter groups and move betas or momentum along: what they planned
# for one optimizer means nothing to another.
_BOUND_TO_THEIR_OPTIMIZER = (OneCycleLR, CyclicLR, SWALR)
# These compute each rate from the first one; all others from the rate before.
_FROM_THE_FIRST_RATE = (LambdaLR, CosineAnnealingWarmRestarts)


def can_follow(scheduler: object) -> bool:
    """Whether a scheduler's plan makes sense on another optimizer: torch's factor-like schedules and subclasses."""
    inner = getattr(scheduler, "_schedulers", [])  # SequentialLR, ChainedScheduler
    return (
        isinstance(scheduler, LRScheduler)
        and not isinstance(scheduler, _BOUND_TO_THEIR_OPTIMIZER)
        and all(can_follow(s) for s in inner)
    )


def move_schedulers(
    configs: Sequence[LRSchedulerConfig], old: Optimizer, new: Optimizer
) -> tuple[list[LRSchedulerConfig], list[str]]:
    """Puts copies of the schedulers of ``old`` on ``new``, each going on from where it stands.

    The new groups' rates are taken as what the schedule starts from: a cosine that had come down to 40 % of its first
    rate makes the new optimizer start at 40 % of its own. ``ReduceLROnPlateau`` is the exception: it begins anew at
    the full rate, because the plateau that it reacted to belongs to the old optimizer.

    Args:
        configs: All scheduler configs of the trainer; those of other optimizers are left out of the answer.
        old: The optimizer that the schedulers belong to; neither it nor they are changed.
        new: An optimizer with as many groups in the same order, its rates set. Its groups get the scheduled rate.

    Returns:
        The configs for ``new``, and the class names of the schedulers that cannot follow (see :func:`can_follow`).
    """
    mine = [config for config in configs if config.scheduler.optimizer is old]
    moved = [config for config in mine if can_follow(config.scheduler)]
    dropped = [type(config.scheduler).__name__ for config in mine if not can_follow(config.scheduler)]

    scheduled = [c for c in moved if not isinstance(c.scheduler, ReduceLROnPlateau)]
    if scheduled:
        # A scheduler's constructor is what makes torch notice the optimizer's steps and note the initial rates.
        LambdaLR(new, lambda _: 1.0)
        for old_group, new_group in zip(old.param_groups, new.param_groups, strict=True):
            first = float(old_group.get("initial_lr", old_group["lr"]))
            new_group["lr"] *= float(old_group["lr"]) / first if first else 1.0
    scale = max(group_rates(new)) / (max(group_rates(old)) or 1.0)
    moved = [replace(config, scheduler=_copy_onto(config.scheduler, new, scale)) for config in moved]
    note_full_rates(moved)
    return moved, dropped


def _copy_onto(scheduler: Any, optimizer: Optimizer, scale: float) -> Any:
    moved = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if value is scheduler.optimizer:  # under whatever name a subclass keeps it
            setattr(moved, name, optimizer)
    moved._last_lr = [group["lr"] for group in optimizer.param_groups]
    if hasattr(moved, "eta_min"):  # an absolute rate; the schedule keeps its shape if it is scaled like the rest
        moved.eta_min = moved.eta_min * scale
    if isinstance(moved, ReduceLROnPlateau):
        moved._reset()
        moved.min_lrs = [rate * scale for rate in moved.min_lrs]
        moved.last_epoch = 0
    if hasattr(moved, "base_lrs"):
        moved.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    if hasattr(moved, "_schedulers"):
        moved._schedulers = [_copy_onto(inner, optimizer, scale) for inner in moved._schedulers]
    return moved


def note_full_rates(configs: Sequence[LRSchedulerConfig]) -> None:
    """Writes down, as ``initial_lr`` in the parameter groups, which rate each schedule is reckoned from.

    Schedulers do that themselves, with two exceptions that :func:`move_schedulers` needs: ``ReduceLROnPlateau`` does
    not, and a learning rate finder changes the rate after the schedulers were made; they go on from it, and its change
    would be taken for the schedule's. Nothing that a scheduler computes changes.

    Args:
        configs: Scheduler configs, before the first step.
    """
    for scheduler in (config.scheduler for config in configs):
        if not can_follow(scheduler) or isinstance(scheduler, _FROM_THE_FIRST_RATE):
            continue
        for group, last in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            if isinstance(scheduler, ReduceLROnPlateau):
                group.setdefault("initial_lr", float(group["lr"]))
            elif last and float(group["lr"]) != float(last):
                group["initial_lr"] *= float(group["lr"]) / float(last)
