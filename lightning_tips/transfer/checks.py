"""What can be wrong with a transfer, said before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_tips.core import did_you_mean
from lightning_tips.transfer.freeze import BATCH_NORM_POLICIES
from lightning_tips.transfer.schedule import PRESETS, Phase, is_number, is_whole, read_plan


def check_arguments(layer_decay: float, batch_norm: str, cache_gigabytes: float, preset: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments of the callback that make no sense."""
    if not (is_number(layer_decay) and 0 < layer_decay <= 1):
        raise ValueError(f"layer_decay={layer_decay!r} must be above 0 and at most 1.")
    if batch_norm not in BATCH_NORM_POLICIES:
        raise ValueError(f"batch_norm={batch_norm!r} is unknown. {did_you_mean(str(batch_norm), BATCH_NORM_POLICIES)}")
    if not cache_gigabytes > 0:
        raise ValueError(f"cache_gigabytes={cache_gigabytes!r} must be above 0; to keep nothing, cache_features=False.")
    if preset["mode"] not in ("min", "max"):
        raise ValueError(f"mode={preset['mode']!r} must be 'min' or 'max'.")
    for name, least in (("phase_epochs", 1), ("patience", 1), ("warmup_steps", 0)):
        if not (is_whole(preset[name]) and preset[name] >= least):
            raise ValueError(f"{name}={preset[name]!r} must be a whole number of {least} or more.")
    for name in ("probe_l2", "l2_sp"):
        if not (is_number(preset[name]) and preset[name] >= 0):
            raise ValueError(f"{name}={preset[name]!r} must be a number of 0 or more.")
    rate = preset["fine_tune_lr"]
    if rate is not None and not (is_number(rate) and rate > 0):
        raise ValueError(f"fine_tune_lr={rate!r} is no learning rate; give a number above 0 or None.")


def read_schedule(schedule: Any) -> list[Phase]:
    """The phases of a list or file; a name that is neither says what it may have meant."""
    if isinstance(schedule, str) and not Path(schedule).is_file():
        raise ValueError(
            f"schedule={schedule!r} is neither a file nor known by name. {did_you_mean(schedule, PRESETS)}"
        )
    return read_plan(schedule)


def warn_of_unread(callback: type, given: Mapping[str, Any], where: str, instead: str) -> None:
    """Warns of arguments that differ from their defaults, and that nobody looks at.

    Args:
        callback: Whose arguments they are.
        given: Those of them that are not read.
        where: With what.
        instead: What to do.
    """
    defaults = inspect.signature(callback).parameters
    if idle := [name for name, value in given.items() if value != defaults[name].default]:
        rank_zero_warn(f"{callback.__name__} with {where} does not look at {', '.join(idle)}; {instead}.")


def require_some(names: Sequence[str], trains: Collection[str], phase: Phase) -> list[str]:
    """The names among those that the module lets train.

    Raises:
        ValueError: If there are none.
    """
    chosen = [name for name in names if name in trains]
    if not chosen:
        raise ValueError(
            f"Nothing trains in the phase {phase.name!r}: the module itself has frozen all of {', '.join(phase.train)}."
            " Set requires_grad there before the fit; this tip freezes what it has to."
        )
    return chosen


def check_loss(loss: Tensor, phase: Phase, names: Sequence[str]) -> None:
    """Raises for a loss that nothing which trains has a part in: what was taken for the head is something else.

    Raises:
        MisconfigurationException: With what trains.
    """
    if loss.requires_grad:
        return
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise MisconfigurationException(
        f"Nothing that trains in the phase {phase.name!r} has a part in the loss: {listed}. Is that the head? Pass"
        " head=... or backbone=..., or name the layers in the phase."
    )


def warn_if_nothing_new(
    phases: Sequence[Phase], named: Sequence[Sequence[str]], names: Sequence[Sequence[str]]
) -> None:
    """Warns of a phase that names more layers than the one before it, all of which the module itself has frozen.

    Args:
        phases: The plan.
        named: The parameters that each of them names.
        names: Those of them that train.
    """
    idle = [
        number
        for number in range(1, len(phases))
        if set(named[number]) > set(named[number - 1]) and set(names[number]) == set(names[number - 1])
    ]
    if idle:
        number = idle[0]
        frozen = [name for name in named[number] if name not in set(names[number])]
        rank_zero_warn(
            f"In the phase {phases[number].name!r} nothing trains that did not before: the module itself has frozen the"
            f" other {len(frozen)} parameters, {frozen[0]} for one. Let them require gradients before the fit (by an"
            " option such as freeze_backbone=False); this tip freezes what it has to."
        )


def check_saved_plan(saved: Sequence[Mapping[str, Any]] | None, phases: Sequence[Phase], number: int) -> None:
    """Raises when a checkpoint was written in another plan. What lies ahead may be edited."""
    if not saved:  # written before there was a plan: a learning rate finder saves and loads at fit start
        return
    now = [phase.to_dict() for phase in phases]
    if number >= len(now) or [p["train"] for p in now[: number + 1]] != [p["train"] for p in saved[: number + 1]]:
        raise MisconfigurationException(
            f"The checkpoint was written in phase {number + 1} of another schedule: {[p['name'] for p in saved]}, not"
            f" {[p['name'] for p in now]}. Resume with the schedule it was trained with; to start from its weights"
            " alone, load them into the module and call fit without ckpt_path."
        )


def check_cache(phases: Sequence[Phase], cached: Sequence[bool], batch_norm: str) -> None:
    """Raises when features can be kept in no phase, and warns when that would gain nothing."""
    if not any(cached):
        why = (
            "batch_norm='stats' changes them in each step"
            if batch_norm == "stats"
            else "each trains more than the head"
        )
        raise MisconfigurationException(
            f"cache_features=True, but there is no phase whose features can be kept: {why}. Begin with a phase in which"
            " only the head trains, or take cache_features away."
        )
    if all(phase.epochs == 1 for phase, keep in zip(phases[:-1], cached, strict=False) if keep) and not cached[-1]:
        rank_zero_warn(
            "cache_features=True gains nothing in a phase of one epoch. Let the head train alone for longer"
            " (phase_epochs, or epochs of the phase)."
        )


def warn_if_never(trainer: pl.Trainer, phases: Sequence[Phase]) -> None:
    """Warns of phases that the run will end before."""
    last = trainer.max_epochs
    epoch = 0
    for phase, following in pairwise(phases):
        if following.start is not None:
            epoch = following.start
        else:
            epoch += min(n for n in (phase.epochs, _least_epochs(trainer, phase)) if n is not None)
        if last is not None and 0 <= last <= epoch:
            rank_zero_warn(
                f"The phase {following.name!r} never begins: it would in epoch {epoch} at the earliest, and the run"
                f" ends after {last}. Train for longer, or shorten the phases before it."
            )
            return


def _least_epochs(trainer: pl.Trainer, phase: Phase) -> int | None:
    """The epochs after which a metric may end a phase at the earliest: it has to be good once, then not any more."""
    if phase.monitor is None:
        return None
    once_an_epoch = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch is not None
    return phase.patience + 1 if once_an_epoch else 1


def warn_if_last_ends(trainer: pl.Trainer, phases: Sequence[Phase]) -> None:
    """Warns of a last phase that is said to end, and before the run does: nothing comes after it."""
    last = phases[-1]
    ends: int | None = 0
    for phase in phases:
        begins = ends if phase.start is None else phase.start
        is_known = begins is not None and phase.epochs is not None and phase.monitor is None
        ends = begins + phase.epochs if is_known else None  # type: ignore[operator]
    given = [f"monitor {last.monitor!r}"] if last.monitor else []
    given += [f"{last.epochs} epochs"] if last.epochs and ends != trainer.max_epochs else []
    if given:
        rank_zero_warn(
            f"The last phase, {last.name!r}, lasts to the end of the run, so its {' and '.join(given)} make no"
            " difference. Take that away; how long the run is, is a matter of the Trainer (max_epochs, EarlyStopping)."
        )


def find_missing(
    trainer: pl.Trainer, pl_module: pl.LightningModule, wanted: Mapping[str, nn.Parameter]
) -> list[nn.Parameter]:
    """Those that no optimizer holds.

    Raises:
        MisconfigurationException: If there is no optimizer, or several and nobody knows which is to get them.
    """
    optimizers = [o for o in trainer.optimizers if any("lr" in group for group in o.param_groups)]
    if not optimizers:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} configures no optimizer, so no layer would train. Return one from"
            " configure_optimizers."
        )
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    missing = {name: p for name, p in wanted.items() if id(p) not in held}
    if missing and len(optimizers) > 1:
        raise MisconfigurationException(
            f"{len(missing)} parameters are to train and are in none of the {len(optimizers)} optimizers,"
            f" {next(iter(missing))} for one. Give them to one of them in configure_optimizers."
        )
    return list(missing.values())


def check_divisible(optimizers: Sequence[Optimizer]) -> None:
    """Raises for an optimizer that cannot have a rate for each layer."""
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise MisconfigurationException(
                "LBFGS has one learning rate for all parameters. Take layer_decay away, or use another optimizer."
            )
