"""What can be wrong with a transfer, said before the first step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_tips.core import did_you_mean
from lightning_tips.transfer.freeze import BATCH_NORM_POLICIES
from lightning_tips.transfer.schedule import PRESETS, Phase, read_plan


def check_arguments(layer_decay: float, batch_norm: str, preset: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments of the callback that make no sense."""
    if not (math.isfinite(layer_decay) and 0 < layer_decay <= 1):
        raise ValueError(f"layer_decay={layer_decay!r} must be above 0 and at most 1.")
    if batch_norm not in BATCH_NORM_POLICIES:
        raise ValueError(f"batch_norm={batch_norm!r} is unknown. {did_you_mean(str(batch_norm), BATCH_NORM_POLICIES)}")
    if preset["mode"] not in ("min", "max"):
        raise ValueError(f"mode={preset['mode']!r} must be 'min' or 'max'.")
    for name, least in (("phase_epochs", 1), ("patience", 1), ("warmup_steps", 0), ("probe_l2", 0), ("l2_sp", 0)):
        if not preset[name] >= least:
            raise ValueError(f"{name}={preset[name]!r} must be {least} or more.")
    rate = preset["fine_tune_lr"]
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"fine_tune_lr={rate!r} is no learning rate; give a number above 0 or None.")


def read_schedule(schedule: Any) -> list[Phase]:
    """The phases of a list or file; a name that is neither says what it may have meant."""
    if isinstance(schedule, str) and not Path(schedule).exists():
        raise ValueError(
            f"schedule={schedule!r} is neither a file nor known by name. {did_you_mean(schedule, PRESETS)}"
        )
    return read_plan(schedule)


def warn_of_unread(callback: type, preset: Mapping[str, Any]) -> None:
    """Warns of arguments that differ from their defaults and that explicit phases do not look at."""
    defaults = inspect.signature(callback).parameters
    if idle := [name for name, value in preset.items() if value != defaults[name].default]:
        rank_zero_warn(
            f"{callback.__name__} with phases of its own does not look at {', '.join(idle)}; say it in the phases."
        )


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


def check_saved_plan(saved: Sequence[Mapping[str, Any]] | None, phases: Sequence[Phase], number: int) -> None:
    """Raises when a checkpoint was written in another plan. What lies ahead may be edited."""
    if saved is None:
        return
    now = [phase.to_dict() for phase in phases]
    if number >= len(now) or [p["train"] for p in now[: number + 1]] != [p["train"] for p in saved[: number + 1]]:
        raise MisconfigurationException(
            f"The checkpoint was written in phase {number + 1} of another schedule: {[p['name'] for p in saved]}, not"
            f" {[p['name'] for p in now]}. Resume with the schedule it was trained with; to start from its weights"
            " alone, load them into the module and call fit without ckpt_path."
        )


def warn_if_never(trainer: pl.Trainer, phases: Sequence[Phase]) -> None:
    """Warns of phases that the run will end before."""
    last = trainer.max_epochs
    epoch = 0
    for phase, following in pairwise(phases):
        if following.start is not None:
            epoch = following.start
        elif phase.epochs is not None and phase.monitor is None:
            epoch += phase.epochs
        else:
            epoch += 1  # a metric may end it after an epoch at the earliest
        if last is not None and 0 <= last <= epoch:
            rank_zero_warn(
                f"The phase {following.name!r} never begins: it would in epoch {epoch} at the earliest, and the run"
                f" ends after {last}. Train for longer, or shorten the phases before it."
            )
            return


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
