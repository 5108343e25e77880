"""`OptimizerSwitchCallback`: start with Adam, go on with SGD."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.hooks import RemovableHandle

from lightning_tips.core import (
    ActsOn,
    Monitor,
    TipCallback,
    WeightDecay,
    agree,
    before_checkpoint_load,
    callbacks_of,
    install,
    note_full_rates,
    require_strategy,
    warm_up,
)
from lightning_tips.optimizer import checks
from lightning_tips.optimizer.moment import Moment
from lightning_tips.optimizer.swats import SwatsProjection
from lightning_tips.optimizer.switch import Switch, switch_optimizer, target_name


class OptimizerSwitchCallback(TipCallback):
    """Replaces the module's optimizer in the middle of training, by default Adam by SGD when the metric stalls.

    Adam is quick and forgiving at the start, SGD with momentum often ends better (Keskar & Socher 2017, arXiv
    1712.07628). The decision is taken after a validation, the switch happens at the start of the next training epoch
    (``"step"`` and ``"swats"``: before the next optimizer step). Several callbacks make a chain: each one waits
    until the one before it has switched.

    Args:
        optimizer: Makes the optimizer to switch to from parameter groups; in yaml ``class_path`` and ``init_args``.
        lr: Its full learning rate, given to the parameter group with the largest one while the others keep their ratio;
            a schedule that goes on comes on top. ``None``: what ``optimizer`` says. ``"auto"``: the SWATS projection,
            for SGD only; a fallback when no good rate is known, a rate tuned for SGD ends better.
        lr_scheduler: Makes a scheduler for the new optimizer. ``None``: the module's own schedulers go on, on the new
            optimizer; the ones that cannot (one-cycle and the like) are dropped with a message.
        trigger: ``"plateau"``: the metric stopped improving. ``"fluctuation"``: its trend drowns in its fluctuation.
            ``"swats"``: the projected learning rate settled. ``"epoch"``, ``"step"``: ``at`` a given time.
        at: For ``"epoch"``: how many epochs the first optimizer gets. For ``"step"``: how many optimizer steps, as
            ``trainer.global_step`` counts them (those of all optimizers together).
        monitor: Logged metric that ``"plateau"`` and ``"fluctuation"`` watch, from validation or, where validation
            does not log it, from the training epoch.
        mode: ``"min"`` or ``"max"``.
        patience: Validations without improvement before it decides; 3 or more. The larger, the smaller an improvement
            it can tell from noise.
        min_delta: Smallest improvement over ``patience`` validations that counts, in units of the metric.
        noise_margin: How far an improvement must stand out of the metric's own noise: 1 is the tested margin, a factor
            on it; 0 looks at the slope alone.
        cooldown: Validations to ignore first (in a chain: after the switch before).
        min_epochs: No switch before so many epochs are over; counts for ``"swats"`` too.
        smoothing: Factor in [0, 1) of the moving average that the metric passes first; 0 for none.
        tolerance: For ``"swats"``: how far, as a share, the projection may still drift.
        weight_decay: How the old weight decay comes over: ``"map"`` translates between decoupled (AdamW) and L2 (SGD)
            unless ``optimizer`` sets one itself, ``"keep"`` takes the number, ``"optimizer"`` the new one's.
        warmup_steps: Optimizer steps over which the new rate rises from near 0.
        lr_scheduler_interval: ``"epoch"`` or ``"step"``, for ``lr_scheduler``.
        optimizer_index: Which optimizer of a module with several.

    Raises:
        ValueError: For arguments that make no sense.
        MisconfigurationException: Before the first step, for a strategy, callback or module it cannot work with.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> switch = OptimizerSwitchCallback(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), patience=3)
        >>> trainer = Trainer(callbacks=[switch], logger=False, accelerator="cpu")
    """

    tip = "optimizer"
    acts_on = ActsOn.OPTIMIZER

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
        lr: float | Literal["auto"] | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        trigger: Literal["plateau", "fluctuation", "swats", "epoch", "step"] = "plateau",
        at: int | None = None,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        noise_margin: float = 1.0,
        cooldown: int = 0,
        min_epochs: int = 1,
        smoothing: float = 0.0,
        tolerance: float = 0.1,
        weight_decay: WeightDecay = "map",
        warmup_steps: int = 0,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        optimizer_index: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.lr = lr
        self.lr_scheduler = lr_scheduler
        self.trigger = trigger
        self.at = at
        self.monitor = monitor
        self.warmup_steps = warmup_steps
        self.weight_decay: WeightDecay = weight_decay
        self.lr_scheduler_interval = lr_scheduler_interval
        self.optimizer_index = optimizer_index
        checks.check_arguments(
            trigger,
            at,
            lr,
            weight_decay,
            lr_scheduler_interval,
            warmup_steps=warmup_steps,
            optimizer_index=optimizer_index,
            min_epochs=min_epochs,
        )
        stall = {"mode": mode, "patience": patience, "min_delta": min_delta, "noise_margin": noise_margin}
        stall |= {"cooldown": cooldown, "smoothing": smoothing}
        checks.warn_of_unread(OptimizerSwitchCallback, trigger, stall, min_epochs, tolerance)
        self._target = target_name(optimizer)  # for the key in checkpoints
        self._guard: RemovableHandle | None = None  # on the replaced optimizer
        self._projection = SwatsProjection() if trigger == "swats" or lr == "auto" else None
        metric = Monitor(monitor, type(self).__name__)
        self._moment = Moment(trigger, at, min_epochs, metric, stall, tolerance, self._projection)
        self.reset()

    @property
    def switched(self) -> bool:
        """Whether the new optimizer is in use."""
        return self._switched

    def describe(self) -> str:
        """For the table at fit start."""
        return f"{self._plan} {self._moment.describe()}"

    def outlook(self) -> str:
        """For the table at fit end, when there was no switch."""
        return f"no switch: the moment for {self.describe()} did not come"

    # ---- state

    @property
    def state_key(self) -> str:
        """Tells the switches of a chain apart in a checkpoint."""
        told = {name: getattr(self, name) for name in ("trigger", "at", "lr", "optimizer_index")}
        metric = {"monitor": self.monitor} if self._moment.stall is not None else {}
        return f"{type(self).__qualname__}{told | metric | {'optimizer': self._target}}"

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self._switched = False
        self._rate: float | None = None  # the rate found at the switch, for the same switch on resume
        self._steps = 0  # taken by the new optimizer
        self._plan = self._becomes = ""
        self.previous: list[OptimizerSwitchCallback] = []  # those of the chain that switch earlier
        self._checkpoint_options: set[str] | None = None
        self._moment.reset()

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return super().state_dict() | {
            "switched": self._switched,
            "rate": self._rate,
            "steps": self._steps,
            **self._moment.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`; the optimizer itself follows in ``on_fit_start``."""
        self._switched = bool(state["switched"])
        self._rate = None if state["rate"] is None else float(state["rate"])
        self._steps = int(state["steps"])
        self._moment.load_state_dict(state)

    # ---- before the first step

    def conflict_with(self, other: object) -> str | None:
        """Stochastic weight averaging keeps the optimizer that it found, and sets its rate."""
        if isinstance(other, StochasticWeightAveraging):
            return (
                "it holds on to the first optimizer and sets its learning rate. EMAWeightAveraging and WeightAveraging"
                " average the weights under any optimizer; use one of them."
            )
        return None

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks what can be known before anything is built."""
        require_strategy(trainer, self)
        self._checkpoint_options = None
        chain = [tip for tip in _switches(trainer) if tip.optimizer_index == self.optimizer_index]
        self.previous = chain[: chain.index(self)]
        checks.check_chain(self.trigger, self.at, ((earlier.trigger, earlier.at) for earlier in self.previous))
        checks.warn_if_never(trainer, self.trigger, self.at, self.monitor, self._moment.stall)
        if trainer.strategy.restore_checkpoint_after_setup:
            before_checkpoint_load(trainer.strategy, self.state_key, partial(self._rebuild_for, trainer))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Checks that the checkpoint's switches are known here, and notes which options its optimizer has."""
        checks.check_known(checkpoint, {tip.state_key for tip in _switches(trainer)})
        self._checkpoint_options = checks.group_options(checkpoint, self.optimizer_index)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tries the switch out. On resume after the switch, does it before the optimizer's state is loaded."""
        checks.check_optimizer(trainer, pl_module, self.optimizer_index)
        trial = self._make(trainer)
        checks.check_trial(pl_module, trial, self.lr)
        old = self.previous[-1]._becomes if self.previous else type(trainer.optimizers[self.optimizer_index]).__name__
        self._becomes = type(trial.optimizer).__name__
        self._plan = f"{old} -> {self._becomes} (lr {self.lr or f'{trial.full_rate:.4g}'})"
        if self._switched and not trainer.strategy.restore_checkpoint_after_setup:
            self._install(trainer, trial)
        self._check_resumable(trainer)

    def _check_resumable(self, trainer: pl.Trainer) -> None:
        is_last = not any(self in other.previous for other in _switches(trainer))
        if is_last and self._checkpoint_options is not None:
            checks.check_resumable(trainer.optimizers[self.optimizer_index], self._checkpoint_options)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts to watch."""
        super().on_train_start(trainer, pl_module)
        if self._switched and self._guard is None:  # this trainer goes on, and its strategy restored no checkpoint
            self._install(trainer, self._make(trainer))
        if trainer.global_step == 0:
            note_full_rates(trainer.lr_scheduler_configs)
        self._moment.on_train_start(trainer)
        if self._armed:
            self._start_projection(trainer)

    # ---- when

    @property
    def _armed(self) -> bool:
        return not self._switched and all(earlier._switched for earlier in self.previous)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The metric is looked for before and after validation."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._moment.on_validation_start(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decides, if validation logs the metric."""
        if not self._switched and trainer.state.fn == TrainerFn.FITTING:
            self._moment.on_validation_end(trainer, self._armed)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decides, if training logs the metric."""
        if not self._switched:
            self._moment.on_train_epoch_end(trainer, self._armed)

    def start_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switches, if that was decided."""
        if not self._switched:
            self._moment.on_train_epoch_start(trainer)
        if self._armed and self._moment.is_due_at_epoch(trainer):
            self._switch(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Switches between two steps, for the triggers that count steps."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        # Gradients that are being accumulated lie on the parameters, so none is lost.
        if self._armed and self._moment.is_due_at_step(trainer):
            self._switch(trainer)

    # ---- the switch

    def _make(self, trainer: pl.Trainer) -> Switch:
        """The switch as it would be now, not yet installed."""
        return switch_optimizer(
            trainer.optimizers[self.optimizer_index],
            self.optimizer,
            lr=self._rate if isinstance(self.lr, str) else self.lr,
            schedulers=trainer.lr_scheduler_configs,
            new_scheduler=self.lr_scheduler,
            interval=self.lr_scheduler_interval,
            monitor=self.monitor,
            weight_decay=self.weight_decay,
        )

    def _switch(self, trainer: pl.Trainer) -> None:
        details: dict[str, Any] = {"trigger": self.trigger}
        old = trainer.optimizers[self.optimizer_index]
        if self._projection is not None:
            trial = self._make(trainer)
            projected = agree(trainer, self._projection.rate_for(trial.optimizer))
            self._projection.unwatch()
            if projected is not None:
                details["swats_lr"] = projected
                if self.lr == "auto":  # read off the old optimizer's scheduled rate, so the share is in it already
                    self._rate = projected / (trial.share or 1.0)
        switch = self._make(trainer)
        checks.warn_about_rate(self.lr, switch, details.get("swats_lr"))
        self._switched, self._moment.pending = True, False
        self._install(trainer, switch)
        self.record(trainer, f"{type(old).__name__} -> {type(switch.optimizer).__name__}", **switch.details | details)
        for later in _switches(trainer):
            if self in later.previous and later._armed:
                later._start_projection(trainer)

    def _install(self, trainer: pl.Trainer, switch: Switch) -> None:
        self._guard = checks.refuse_steps(trainer.optimizers[self.optimizer_index], trainer.lightning_module)
        install(trainer, self.optimizer_index, switch.optimizer, switch.schedulers)
        if self.warmup_steps:
            warm_up(switch.optimizer, self.warmup_steps, lambda: self._steps)
        switch.optimizer.register_step_post_hook(self._count_step)

    def _count_step(self, *_: Any) -> None:
        self._steps += 1

    def release(self) -> None:
        """Lets go of the module's optimizers: it may hand the same ones to the next fit."""
        super().release()
        if self._guard is not None:
            self._guard.remove()
            self._guard = None
        if self._projection is not None:
            self._projection.unwatch()

    def _rebuild_for(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Brings the checkpoint's optimizer into place, for strategies that load it together with the weights."""
        self.on_load_checkpoint(trainer, trainer.lightning_module, checkpoint)
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            self.load_state_dict(state)
            if self._switched:
                self._install(trainer, self._make(trainer))
        self._check_resumable(trainer)

    def _start_projection(self, trainer: pl.Trainer) -> None:
        if self._projection is not None:
            self._projection.watch(trainer.optimizers[self.optimizer_index])


def _switches(trainer: pl.Trainer) -> list[OptimizerSwitchCallback]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, OptimizerSwitchCallback)]
