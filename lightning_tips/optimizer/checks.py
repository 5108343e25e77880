"""What can be wrong with an optimizer switch, said before the first step wherever it can be known."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tips.core import callbacks_of, did_you_mean
from lightning_tips.optimizer.switch import Switch, is_sgd
from lightning_tips.optimizer.triggers import MetricTrigger

TRIGGERS = ("plateau", "fluctuation", "swats", "epoch", "step")
# Options that tell one family of optimizers from another, whatever else a torch version adds.
_TELLING_OPTIONS = {"momentum", "dampening", "betas", "alpha", "rho"}
WEIGHT_DECAYS = ("map", "keep", "optimizer")
INTERVALS = ("epoch", "step")


def check_arguments(
    trigger: str,
    at: int | None,
    lr: float | str | None,
    weight_decay: str,
    lr_scheduler_interval: str,
    **not_negative: int,
) -> None:
    """Raises ValueError for arguments of the callback that make no sense."""
    for name, value, known in (
        ("trigger", trigger, TRIGGERS),
        ("weight_decay", weight_decay, WEIGHT_DECAYS),
        ("lr_scheduler_interval", lr_scheduler_interval, INTERVALS),  # Lightning would silently never step it
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown. {did_you_mean(str(value), known)}")
    if (trigger in ("epoch", "step")) != (at is not None):
        needs = "at=<a number>" if at is None else "no `at`: it decides by itself"
        raise ValueError(f"trigger={trigger!r} needs {needs}.")
    if at is not None and at < 0:
        raise ValueError(f"at={at} lies before the start; give 0 or more.")
    usable = lr is None or lr == "auto" or (not isinstance(lr, str) and math.isfinite(lr) and lr > 0)
    if not usable:
        raise ValueError(f"lr={lr!r} is no learning rate; give a number above 0, 'auto' or None.")
    for name, number in not_negative.items():
        if number < 0:
            raise ValueError(f"{name}={number} must be 0 or more.")


def refuse_steps(optimizer: Optimizer, pl_module: pl.LightningModule) -> RemovableHandle:
    """Makes a replaced optimizer raise when somebody steps it all the same; returns what takes that off again."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(
            f"{type(pl_module).__name__} steps the {type(optimizer).__name__} that was replaced: it keeps the optimizer"
            " in an attribute. Get it from self.optimizers() in each training_step instead."
        )

    return optimizer.register_step_pre_hook(refuse)


def check_chain(trigger: str, at: int | None, earlier: Iterable[tuple[str, int | None]]) -> None:
    """Raises for a chain in the wrong order.

    Args:
        trigger: Trigger of this switch.
        at: Its time.
        earlier: Trigger and time of the switches that stand before it.
    """
    for other, before in earlier:
        if other == trigger and at is not None and before is not None and before >= at:
            raise MisconfigurationException(
                f"Switches at {trigger} {before} and then at {trigger} {at}: the callbacks of a chain stand in the"
                " order in which they switch, each later than the one before."
            )


def warn_if_never(trainer: pl.Trainer, trigger: str, at: int | None, monitor: str, stall: MetricTrigger | None) -> None:
    """Warns of a switch that the run will end before."""
    end = {"epoch": trainer.max_epochs, "step": trainer.max_steps}.get(trigger)
    if at is not None and end is not None and 0 <= end <= at:
        rank_zero_warn(f"There will be no switch: it is set for {trigger} {at}, and the run ends at {trigger} {end}.")
    if stall is None:
        return
    # With several validations an epoch, or a limit of steps, nobody knows their number.
    epochs = trainer.max_epochs or -1
    if epochs > 0 and trainer.check_val_every_n_epoch and trainer.val_check_interval == 1.0:
        first = max((stall.cooldown + stall.patience + 1) * trainer.check_val_every_n_epoch, stall.min_epochs)
        if first >= epochs:
            rank_zero_warn(
                f"There will be no switch: cooldown {stall.cooldown}, patience {stall.patience} and min_epochs"
                f" {stall.min_epochs} put it after epoch {first} at the earliest, and the run ends after"
                f" {epochs}. Train for longer, or choose trigger='epoch'."
            )
    early = (c for c in callbacks_of(trainer) if isinstance(c, EarlyStopping) and c.monitor == monitor)
    for stopping in early:
        if stopping.patience <= stall.patience:
            rank_zero_warn(
                f"EarlyStopping on {stopping.monitor} with patience {stopping.patience} ends the run before the"
                f" switch, which has patience {stall.patience}. Give EarlyStopping several times that."
            )


def warn_of_unread(callback: type, trigger: str, metric: dict[str, Any], min_epochs: int, tolerance: float) -> None:
    """Warns of arguments that differ from their defaults and that the trigger does not look at.

    Args:
        callback: The class, for the defaults.
        trigger: The trigger.
        metric: What the callback was given for the arguments that belong to a metric.
        min_epochs: What it was given for that.
        tolerance: Likewise.
    """
    given = metric | {"min_epochs": min_epochs, "tolerance": tolerance}
    read = {"plateau": (*metric,), "fluctuation": (*metric,), "swats": ("tolerance",)}.get(trigger, ())
    if trigger not in ("epoch", "step"):
        read = (*read, "min_epochs")
    defaults = inspect.signature(callback).parameters
    if idle := [name for name, value in given.items() if name not in read and value != defaults[name].default]:
        rank_zero_warn(f"{callback.__name__} with trigger={trigger!r} does not look at {', '.join(idle)}.")


def check_known(checkpoint: dict[str, Any], keys: set[str]) -> None:
    """Raises when a checkpoint was written after a switch that nobody here remembers.

    Args:
        checkpoint: What is resumed from.
        keys: ``state_key`` of the switches of this trainer.
    """
    for key, state in checkpoint.get("callbacks", {}).items():
        if key.startswith("OptimizerSwitchCallback{") and key not in keys and state.get("switched"):
            raise MisconfigurationException(
                f"The checkpoint was written after the switch of {key}, which is not among this trainer's callbacks:"
                f" {sorted(keys)}. Resume with the arguments (trigger, at, monitor, lr, optimizer) that it was trained"
                " with; to go on from its weights alone, load them into the module and call fit without ckpt_path."
            )


def check_optimizer(trainer: pl.Trainer, pl_module: pl.LightningModule, index: int) -> None:
    """Raises when the module has no such optimizer."""
    # A module that returns None from configure_optimizers gets a stand-in without parameter groups.
    names = [type(o).__name__ for o in trainer.optimizers if any("lr" in group for group in o.param_groups)]
    if index >= len(names):
        raise MisconfigurationException(
            f"There is no optimizer {index} to switch from: {type(pl_module).__name__} configures"
            f" {names or 'none'}. Set optimizer_index, or return an optimizer from configure_optimizers."
        )


def check_trial(pl_module: pl.LightningModule, trial: Switch, lr: float | str | None) -> None:
    """Raises for a switch that could be made but would not do what it should."""
    name = type(trial.optimizer).__name__
    if lr == "auto" and not is_sgd(trial.optimizer):
        raise MisconfigurationException(f"lr='auto' projects a rate for SGD, not for {name}; give lr a number.")
    if trial.dropped and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{', '.join(trial.dropped)} cannot follow to {name}, and {type(pl_module).__name__} steps its schedulers"
            " itself (manual optimization). Pass lr_scheduler=... to replace it."
        )


def group_options(checkpoint: dict[str, Any], index: int) -> set[str] | None:
    """The option names of an optimizer in a checkpoint, ``None`` where it holds no optimizer state."""
    states = checkpoint.get("optimizer_states") or []
    groups = states[index].get("param_groups") if index < len(states) else None
    return set(groups[0]) if groups else None


def check_resumable(optimizer: Optimizer, saved: set[str]) -> None:
    """Raises when a checkpoint was written with another kind of optimizer than the one about to load it.

    Torch loads it all the same, and fails in the first step with a KeyError, or trains on with the wrong options.
    """
    if set(optimizer.defaults) & _TELLING_OPTIONS != saved & _TELLING_OPTIONS:
        raise MisconfigurationException(
            f"The checkpoint holds another optimizer than {type(optimizer).__name__}: its options are"
            f" {sorted(saved - {'params', 'initial_lr'})}. Resume with the module, the OptimizerSwitchCallbacks and the"
            " arguments (trigger, at, lr, optimizer) that it was trained with; to go on from its weights alone, load"
            " them into the module and call fit without ckpt_path."
        )


def warn_about_rate(lr: float | str | None, switch: Switch, projected: float | None) -> None:
    """Warns when ``lr='auto'`` found nothing, and when a given rate is far from the projected one."""
    used = float(switch.details["lr"])
    name = type(switch.optimizer).__name__
    if lr == "auto":
        if projected is None:
            rank_zero_warn(
                f"The steps so far project on no positive learning rate; {name} starts with its own, {used:.3g}. Give"
                " lr a number, or let the first optimizer run longer."
            )
    elif projected is not None and is_sgd(switch.optimizer) and not 1 / 3 <= used / projected <= 3:
        rank_zero_warn(
            f"{name} starts with lr={used:.3g}, {used / projected:.2g} times what the SWATS projection gives"
            f" ({projected:.3g}). A rate tuned for SGD is often right all the same; if the loss jumps, use warmup_steps"
            " or a smaller lr."
        )
