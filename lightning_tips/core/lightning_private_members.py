"""A LightningModule that runs inside another one's Trainer: the private attributes of Lightning that this takes.

Beside `lightning_private.py` the only place of such uses; `tests/test_lightning_private*.py` looks at both.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.optimization.manual import _ManualOptimization
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.fx_validator import _FxValidator
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer

from lightning_tips.core.lightning_private import delay_static_graph_again


def _view(original: Any, properties: dict[str, Any] | None = None, **own: Any) -> Any:
    """An object of the class of ``original`` with a few attributes of its own.

    All others are read from the original, and set there.
    """

    def get(self: Any, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)

    def put(self: Any, name: str, value: Any) -> None:
        if name in self.__dict__:
            self.__dict__[name] = value
        else:
            setattr(self.__dict__["_original"], name, value)

    kind = type(original)
    changed = {"__getattr__": get, "__setattr__": put, "__module__": __name__} | (properties or {})
    view: Any = object.__new__(type(f"{kind.__name__}OfMember", (kind,), changed))
    view.__dict__.update(own, _original=original)
    return view


class _Relay(pl.Callback):
    """Lets the Trainer's callbacks know of what happens inside the optimization of a member."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        call._call_callback_hooks(self._trainer, "on_before_zero_grad", optimizer)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        call._call_callback_hooks(self._trainer, "on_before_backward", loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        call._call_callback_hooks(self._trainer, "on_after_backward")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        call._call_callback_hooks(self._trainer, "on_before_optimizer_step", optimizer)


class MemberRun:
    """A LightningModule that runs inside another one's Trainer as it would run alone.

    The member's ``trainer`` is a view of the real one. Its own are ``lightning_module``, ``strategy`` with
    ``optimizers``, schedulers, gradient scaler and DDP's wrapper, ``global_step``, ``callbacks``, ``callback_metrics``
    (without the prefix), ``train_dataloader`` if there is one for each member, and ``should_stop``; all else is the
    real Trainer's. Lightning's own loops of optimization then
    run on that view, so that gradient accumulation, clipping, precision, manual optimization and every hook in between
    are not written a second time.

    Args:
        trainer: The real Trainer, from ``setup`` on.
        module: The member.
        prefix: What the names of its metrics begin with in the real Trainer.
        callbacks: Its own ones.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, prefix: str, callbacks: list[pl.Callback]
    ) -> None:
        def callback_metrics(_: Any) -> dict[str, Any]:
            known = trainer.callback_metrics
            return known | {k[len(prefix) :]: v for k, v in known.items() if k.startswith(prefix)}

        def train_dataloader(_: Any) -> Any:
            loaders = trainer.train_dataloader
            return loaders.get(prefix[:-1], loaders) if isinstance(loaders, dict) else loaders

        def strategy(view: Any) -> Strategy:
            return view.__dict__["_member_strategy"]

        properties = {
            "strategy": property(strategy),
            "callback_metrics": property(callback_metrics),
            "train_dataloader": property(train_dataloader),
            "estimated_stepping_batches": property(lambda _: trainer.estimated_stepping_batches),
            "progress_bar_callback": property(lambda _: trainer.progress_bar_callback),
        }
        self._real, self.module = trainer, module
        self.trainer = _view(
            trainer,
            properties,
            callbacks=[_Relay(trainer), *callbacks],
            should_stop=False,
            fit_loop=None,
            _member_strategy=self._make_strategy(),
            _member_prefix=prefix,
        )
        epoch_loop = _view(trainer.fit_loop.epoch_loop, trainer=self.trainer)
        epoch_loop.__dict__["automatic_optimization"] = _AutomaticOptimization(self.trainer)
        epoch_loop.__dict__["manual_optimization"] = _ManualOptimization(self.trainer)
        self._epoch_loop = epoch_loop
        self.trainer.fit_loop = _view(trainer.fit_loop, trainer=self.trainer, epoch_loop=epoch_loop)
        module._trainer = self.trainer

    def _make_strategy(self) -> Strategy:
        strategy = copy.copy(self._real.strategy)
        for replaced in ("configure_ddp", "training_step", "load_checkpoint"):  # by tips, on the instance
            vars(strategy).pop(replaced, None)
        strategy._lightning_module = strategy.model = self.module
        strategy.optimizers, strategy.lr_scheduler_configs = [], []
        precision = copy.copy(strategy.precision_plugin)
        if getattr(precision, "scaler", None) is not None:
            precision.scaler = copy.deepcopy(precision.scaler)  # type: ignore[attr-defined]
        strategy.precision_plugin = precision
        return strategy

    @property
    def strategy(self) -> Strategy:
        """The member's own."""
        return self.trainer.strategy

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
        """What the member's ``configure_optimizers`` gives, read as Lightning reads it. Wraps the member for DDP."""
        strategy = self._make_strategy()
        self.trainer.__dict__["_member_strategy"] = strategy
        strategy.optimizers, strategy.lr_scheduler_configs = _init_optimizers_and_lr_schedulers(self.module)
        self.wrap()
        return strategy.optimizers, strategy.lr_scheduler_configs

    def wrap(self) -> None:
        """Wraps the member for DDP, anew if it was wrapped before; without DDP it does nothing."""
        strategy = self.strategy
        if isinstance(strategy, DDPStrategy):
            strategy.model = self.module
            delay_static_graph_again(strategy)
            strategy.configure_ddp()

    def call(self, hook: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a hook of the member's callbacks, then the member's own."""
        call._call_callback_hooks(self.trainer, hook, *args, **kwargs)
        return call._call_lightning_module_hook(self.trainer, hook, *args, pl_module=self.module, **kwargs)

    def call_module(self, hook: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a hook of the member alone."""
        return call._call_lightning_module_hook(self.trainer, hook, *args, pl_module=self.module, **kwargs)

    def train(self, batch: Any, batch_idx: int) -> Any:
        """One training step with all that belongs to it; returns what ``on_train_batch_end`` gets as ``outputs``."""
        loop = self._epoch_loop
        kwargs = loop._build_kwargs(OrderedDict(), batch, batch_idx)
        if self.module.automatic_optimization:
            return loop.automatic_optimization.run(self.strategy.optimizers[0], batch_idx, kwargs)
        return loop.manual_optimization.run(kwargs)

    def evaluate(self, step: str, *args: Any) -> Any:
        """``validation_step``, ``test_step`` or ``predict_step``, in the context of the precision in use."""
        return call._call_strategy_hook(self.trainer, step, *args)

    def update_schedulers(self, *args: Any, **kwargs: Any) -> None:
        """Steps the schedulers that are due; takes what Lightning gives to the epoch loop."""
        self._epoch_loop.update_lr_schedulers(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Plain data: how many optimizer steps it has made, the gradient scaler, whether it has stopped."""
        loop = self._epoch_loop
        return {
            "automatic_steps": loop.automatic_optimization.optim_progress.optimizer.step.total.completed,
            "manual_steps": loop.manual_optimization.optim_step_progress.total.completed,
            "precision": self.strategy.precision_plugin.state_dict(),
            "should_stop": bool(self.trainer.should_stop),
            "callbacks": {c.state_key: c.state_dict() for c in self.trainer.callbacks if c.state_dict()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; the optimizers and schedulers are restored by Lightning."""
        loop = self._epoch_loop
        for name, total in (
            ("automatic_steps", loop.automatic_optimization.optim_progress.optimizer.step.total),
            ("manual_steps", loop.manual_optimization.optim_step_progress.total),
        ):
            total.ready = total.completed = state[name]
        self.strategy.precision_plugin.load_state_dict(state["precision"])
        self.trainer.should_stop = state["should_stop"]
        for callback in self.trainer.callbacks:
            if callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])


def run_members(trainer: pl.Trainer, runs: list[MemberRun]) -> Callable[[], None]:
    """Lets the Trainer step the members' schedulers, and wrap each member for DDP instead of their parent.

    Args:
        trainer: The real one, in ``setup``.
        runs: The members.

    Returns:
        A function that takes the change back.
    """
    epoch_loop, strategy = trainer.fit_loop.epoch_loop, trainer.strategy

    def update_lr_schedulers(*args: Any, **kwargs: Any) -> None:
        for run in runs:
            run.update_schedulers(*args, **kwargs)

    def configure_ddp() -> None:
        for run in runs:
            if run.strategy.optimizers:  # else it is not their turn yet
                run.wrap()

    epoch_loop.update_lr_schedulers = update_lr_schedulers  # type: ignore[method-assign]
    if isinstance(strategy, DDPStrategy):
        strategy.configure_ddp = configure_ddp  # type: ignore[method-assign]

    def take_back() -> None:
        vars(epoch_loop).pop("update_lr_schedulers", None)
        vars(strategy).pop("configure_ddp", None)

    return take_back


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether this batch's gradients are kept for the next one, without an optimizer step."""
    return trainer.fit_loop._should_accumulate()


def count_step(trainer: pl.Trainer) -> None:
    """Counts one in ``trainer.global_step``, in a module that optimizes manually but not by Lightning's optimizers."""
    loop = trainer.fit_loop.epoch_loop
    # Both, because the Trainer reads the one or the other as the module says at that moment that it optimizes.
    for progress in (
        loop.manual_optimization.optim_step_progress,
        loop.automatic_optimization.optim_progress.optimizer.step,
    ):
        progress.increment_ready()
        progress.increment_completed()


def log_levels(module: pl.LightningModule, on_step: bool | None, on_epoch: bool | None) -> tuple[bool, bool]:
    """What ``on_step`` and ``on_epoch`` of ``module.log`` are in the hook that is running, where they are None."""
    hook = module._current_fx_name
    if hook is None:
        return bool(on_step), bool(on_epoch)
    return _FxValidator.check_logging_and_get_default_levels(hook, on_step=on_step, on_epoch=on_epoch)
