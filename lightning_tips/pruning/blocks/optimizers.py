"""Optimizers of a network that lost blocks: without their parameters, and with the same groups after a resume."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from lightning_tips.core.resize import RemovedBlock
from lightning_tips.pruning.blocks.find import set_module


def keep_parameters(optimizer: Optimizer, keep: Callable[[nn.Parameter], bool]) -> None:
    """Leaves in an optimizer only the parameters that ``keep`` accepts, with their state."""
    for group in optimizer.param_groups:
        stay = [keep(p) for p in group["params"]]
        for parameter, stays in zip(group["params"], stay, strict=True):
            if not stays:
                optimizer.state.pop(parameter, None)
        if "param_names" in group:
            group["param_names"] = [n for n, stays in zip(group["param_names"], stay, strict=True) if stays]
        group["params"] = [p for p, stays in zip(group["params"], stay, strict=True) if stays]


def configure_with_blocks(module: pl.LightningModule) -> Callable[[], None]:
    """Lets ``configure_optimizers`` see the whole network also where blocks have been taken out of it.

    Somebody may make a group of each block. Those groups stay when their blocks go, as schedulers count them; a resumed
    run has to have them too, or the optimizer's state does not fit. So the blocks are there while optimizers are made,
    and their parameters leave these afterwards.

    Args:
        module: The module; its ``configure_optimizers`` is replaced on the instance.

    Returns:
        A function that takes the change back.
    """
    own = vars(module).get("configure_optimizers")
    configure = module.configure_optimizers
    if getattr(configure, "sees_blocks", False):  # another callback's doing
        return lambda: None

    @functools.wraps(configure)
    def configure_whole() -> Any:
        removed = {name: part for name, part in module.named_modules() if isinstance(part, RemovedBlock)}
        gone: set[int] = set()
        for name, part in removed.items():
            block = part.restored()
            gone |= {id(parameter) for parameter in block.parameters()}
            set_module(module, name, block)
        try:
            configured = configure()
        finally:
            for name, part in removed.items():
                set_module(module, name, part)
        for optimizer in _optimizers_in(configured):
            keep_parameters(optimizer, lambda parameter: id(parameter) not in gone)
        return configured

    configure_whole.sees_blocks = True  # type: ignore[attr-defined]
    module.configure_optimizers = configure_whole  # type: ignore[method-assign]

    def take_back() -> None:
        if vars(module).get("configure_optimizers") is configure_whole:
            del module.configure_optimizers
            if own is not None:
                module.configure_optimizers = own  # type: ignore[method-assign]

    return take_back


def _optimizers_in(configured: Any) -> list[Optimizer]:
    """Those in whatever ``configure_optimizers`` returns."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return _optimizers_in(configured.get("optimizer"))
    if isinstance(configured, list | tuple):
        return [optimizer for part in configured for optimizer in _optimizers_in(part)]
    return []
