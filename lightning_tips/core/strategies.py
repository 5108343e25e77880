"""Which strategies a tip can serve, and the moment before a checkpoint is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_tips.core.lightning_private import SHARDED_METADATA, delay_static_graph_again

CheckpointHook = Callable[[dict[str, Any]], None]


def require_strategy(trainer: pl.Trainer, tip: object, *supported: type[Strategy]) -> None:
    """Refuses a strategy under which a tip was never seen to work.

    Args:
        trainer: The trainer at ``setup``.
        tip: The tip that asks.
        supported: Strategy classes, subclasses included; by default one device, DDP and FSDP2
            (``ModelParallelStrategy``). DeepSpeed, which derives from DDP but owns its optimizer, has to be named.

    Raises:
        MisconfigurationException: With the strategies that work.
    """
    supported = supported or (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
    strategy = trainer.strategy
    unsuited = isinstance(strategy, DeepSpeedStrategy) and DeepSpeedStrategy not in supported
    if unsuited or not isinstance(strategy, supported):
        names = ", ".join(s.__name__ for s in supported)
        raise MisconfigurationException(
            f"{type(tip).__name__} does not work with {type(strategy).__name__}. Use one of: {names} (for sharded"
            " training ModelParallelStrategy, which is FSDP2)."
        )


def wrap_again(strategy: Strategy, module: pl.LightningModule) -> bool:
    """Makes DDP see which parameters require gradients now.

    Its reducer registers those that do when the module is wrapped: one that is thawed later would be trained on each
    rank's own gradient, without a word. Between two optimizer steps; gradients are dropped, as they may be views of the
    old reducer's buckets. To be called on all ranks; does nothing under a strategy that is not DDP.

    Returns:
        Whether there was something to do.
    """
    if not isinstance(strategy, DDPStrategy):
        return False
    for parameter in module.parameters():
        parameter.grad = None
    strategy.model = module
    delay_static_graph_again(strategy)
    strategy.configure_ddp()
    return True


def before_checkpoint_load(strategy: Strategy, key: str, hook: CheckpointHook) -> None:
    """Calls ``hook`` with a checkpoint's metadata just before ``strategy`` loads it to go on training.

    For strategies with ``restore_checkpoint_after_setup``: they load the optimizer's state together with the weights,
    and a callback's own state comes only afterwards, too late to bring the right optimizer into place. When the same
    trainer validates or tests, they would load a checkpoint's optimizer state into whichever optimizer is in use; then
    only the weights are loaded, as other strategies do.

    Args:
        strategy: The strategy instance; its ``load_checkpoint`` is wrapped once however many hooks there are.
        key: Names the hook; another one of the same name replaces it.
        hook: Called in the order of registration with the checkpoint dict, which for a sharded checkpoint is its
            metadata file.
    """
    hooks: dict[str, CheckpointHook] | None = getattr(strategy.load_checkpoint, "hooks", None)
    if hooks is None:
        hooks = {}
        load = strategy.load_checkpoint

        def load_checkpoint(checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
            module = strategy.lightning_module
            if module is not None and module.trainer.state.fn != TrainerFn.FITTING:
                optimizers, strategy.optimizers = strategy.optimizers, []
                try:
                    return load(checkpoint_path, weights_only=weights_only)
                finally:
                    strategy.optimizers = optimizers
            metadata = read_metadata(strategy.broadcast(checkpoint_path), weights_only)
            for registered in hooks.values():
                registered(metadata)
            return load(checkpoint_path, weights_only=weights_only)

        load_checkpoint.hooks = hooks  # type: ignore[attr-defined]
        strategy.load_checkpoint = load_checkpoint  # type: ignore[method-assign]
    hooks[key] = hook


def read_metadata(path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
    """Everything of a Lightning checkpoint but the tensors of a sharded one, which lie in files beside it.

    Args:
        path: The checkpoint's file, or its folder when it is sharded.
        weights_only: As in ``torch.load``.
    """
    path = Path(path)
    file = path / SHARDED_METADATA if path.is_dir() else path
    checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=weights_only, mmap=True)
    return checkpoint
