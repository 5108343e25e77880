"""What is around a network that changes its shape: other ranks, layers that read it, and who watches its score."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_tips.core import agree, callbacks_of
from lightning_tips.pruning.fit.capture import Inputs, call_network
from lightning_tips.pruning.networks.copies import logs_nothing
from lightning_tips.pruning.networks.layers import channels_of
from lightning_tips.pruning.networks.recalibrate import reestimate_batch_norm

BEST_FILES = (
    *("best_k_models", "best_model_path", "best_model_score", "kth_best_model_path", "kth_value", "current_score"),
)
"""Where a ModelCheckpoint has its best."""


def reestimate(trainer: pl.Trainer, network: nn.Module, batches: list[Inputs]) -> None:
    """Estimates BatchNorm's statistics anew, from the same inputs on all ranks."""
    if not batches:
        return
    with isolate_rng(), logs_nothing(network):
        reestimate_batch_norm(network, batches, forward=call_network, include_frozen=True)
    if trainer.world_size > 1:  # devices may differ in the last bit
        buffers = dict(network.named_buffers())
        for name, value in agree(trainer, {name: b.cpu() for name, b in buffers.items()}).items():
            buffers[name].copy_(value)


def read_elsewhere(network: nn.Module, inputs: Any) -> dict[str, str]:
    """Layers whose outputs may be read outside of this call, by layers that do not run in it.

    A second head that only every other step uses is not seen when the network is called; what feeds it must stay. Which
    layers do is not known, so all that fit are meant.

    Args:
        network: A copy; it is run in train and in eval mode.
        inputs: Its inputs.

    Returns:
        The names of the layers, each with that of a layer that may read it.
    """
    layers = {name: part for name, part in network.named_modules() if isinstance(part, _ConvNd | nn.Linear)}
    ran: set[int] = set()
    handles = [part.register_forward_hook(lambda part, *_: ran.add(id(part))) for part in layers.values()]
    was = network.training
    try:
        for training in (True, False):
            with torch.no_grad():
                call_network(network.train(training), inputs)
    finally:
        network.train(was)
        for handle in handles:
            handle.remove()
    idle = {name: part for name, part in layers.items() if id(part) not in ran}
    found = {}
    for name, part in layers.items():
        readers = (other for other, layer in idle.items() if _fits(channels_of(part), layer))
        if id(part) in ran and (reader := next(readers, None)) is not None:
            found[name] = reader
    return found


def _fits(channels: int, layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):  # maybe after a flatten of places that make a square
        places, rest = divmod(layer.in_features, channels)
        return not rest and math.isqrt(places) ** 2 == places
    return channels == getattr(layer, "in_channels", None)


def reset_best(trainer: pl.Trainer) -> None:
    """Lets who keeps a best score judge the network as it is now, without its former, larger self.

    ModelCheckpoint, EarlyStopping, and ReduceLROnPlateau, which would lower the rate when fine-tuning needs it.

    Files stay where they are.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            worst = torch.tensor(float("inf") if callback.mode == "min" else -float("inf"), device="cpu")
            callback.best_k_models = {}
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = worst
        elif isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(float("inf") if callback.mode == "min" else -float("inf"), device="cpu")
    for scheduler in plateau_schedulers(trainer):
        scheduler.best = math.inf if scheduler.mode == "min" else -math.inf
        scheduler.num_bad_epochs = 0


def best_so_far(trainer: pl.Trainer) -> dict[str, list[dict[str, Any]]]:
    """What :func:`reset_best` makes them forget, as plain data for a checkpoint."""
    return {
        kind: [{name: copy.copy(getattr(keeper, name)) for name in names} for keeper in keepers]
        for kind, (keepers, names) in _keepers(trainer).items()
    }


def put_best_back(trainer: pl.Trainer, known: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """The best scores, and files, of the network that has come back; the inverse of :func:`best_so_far`.

    Where there are others now than when it was noted, they begin anew.
    """
    reset_best(trainer)
    for kind, (keepers, _) in _keepers(trainer).items():
        if len(keepers) == len(known[kind]):
            for keeper, values in zip(keepers, known[kind], strict=True):
                for name, value in values.items():
                    setattr(keeper, name, copy.copy(value))


def write_last_again(trainer: pl.Trainer) -> None:
    """After the last epoch: ``last.ckpt`` with the weights that the module has now. All ranks call it."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelCheckpoint) and callback.save_last and callback.last_model_path:
            path = Path(callback.last_model_path)
            if trainer.is_global_zero and path.is_symlink():
                path.unlink()  # else its target, which has a score in its name, would be overwritten
            trainer.strategy.barrier()
            trainer.save_checkpoint(path, callback.save_weights_only)


def _keepers(trainer: pl.Trainer) -> dict[str, tuple[list[Any], tuple[str, ...]]]:
    """Who keeps a best score, by kind, and in which attributes."""
    files = [c for c in callbacks_of(trainer) if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    stops = [c for c in callbacks_of(trainer) if isinstance(c, EarlyStopping)]
    return {
        "files": (files, BEST_FILES),
        "stops": (stops, ("best_score",)),
        "plateaus": (list(plateau_schedulers(trainer)), ("best",)),
    }


def plateau_schedulers(trainer: pl.Trainer) -> list[ReduceLROnPlateau]:
    """The schedulers that wait for a metric to get better."""
    found = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [scheduler for scheduler in found if isinstance(scheduler, ReduceLROnPlateau)]


def watched_by(trainer: pl.Trainer) -> bool:
    """Whether somebody keeps the best score."""
    return bool(plateau_schedulers(trainer)) or any(
        isinstance(c, EarlyStopping) or (isinstance(c, ModelCheckpoint) and c.monitor is not None)
        for c in callbacks_of(trainer)
    )
