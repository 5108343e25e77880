"""Optimizer surgery: a new optimizer on the parameter groups of an old one, and schedulers that follow it.

Pure functions on torch objects; :func:`install` is the one that touches a Trainer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer

from lightning_tips.core.warmup import carry_shares

WeightDecay = Literal["map", "keep", "optimizer"]

# Options that describe where an optimizer stands, not how it was asked to work, or that its class computes itself.
_NEVER_CARRIED = {"params", "lr", "initial_lr", "weight_decay", "step", "param_names"}


def group_rates(optimizer: Optimizer) -> list[float]:
    """The full learning rate of each parameter group, which its schedulers are reckoned from.

    Schedulers remember it as ``initial_lr``, a one-cycle schedule as ``max_lr``; without one it is the rate of now.
    """
    return [_full_rate(group) for group in optimizer.param_groups]


def _full_rate(group: dict[str, Any]) -> float:
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def decay_is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether weight decay shrinks the weights directly (AdamW) instead of entering the gradient (L2, Adam, SGD).

    Torch's and timm's optimizers say so in an option of the group; for the rest the name decides, by the convention
    of Loshchilov & Hutter 2019 (arXiv 1711.05101): AdamW, SGDW, ...; Lion, Adan, AdamP and LAMB decouple too.
    """
    for flag in ("decoupled_weight_decay", "decoupled_decay", "weight_decouple"):
        if flag in group:
            return bool(group[flag])
    name = type(optimizer).__name__
    return name.endswith("W") or name.lower() in {"lion", "adan", "adafactor", "adamp", "lamb", "muon"}


def translate_weight_decay(old: Optimizer, new: Optimizer) -> list[float]:
    """The weight decay for each group of ``new`` that acts as it did in the same group of ``old``.

    Between two L2 penalties the coefficient stays: it is the same term of the same loss. As soon as one of them
    decouples, what is kept is the share by which one step shrinks a weight on which no gradient acts:
    ``lr * weight_decay / (1 - momentum)``, with momentum 0 for a decoupled decay, which momentum does not amplify.
    Adam's L2 term is divided by the size of the gradient, so from Adam to AdamW no coefficient does the same; the
    same rule is used there too, as the nearest.

    Args:
        old: The optimizer of before, with its rates of now.
        new: The optimizer on the same groups, with its rates set.

    Returns:
        One coefficient for each group.
    """
    decays = []
    for old_group, new_group in zip(old.param_groups, new.param_groups, strict=True):
        decay = float(old_group.get("weight_decay", 0.0))
        from_decoupled, to_decoupled = decay_is_decoupled(old, old_group), decay_is_decoupled(new, new_group)
        if from_decoupled or to_decoupled:
            old_rate = _effective_rate(old_group, from_decoupled)
            new_rate = _effective_rate(new_group, to_decoupled)
            decay = decay * old_rate / new_rate if new_rate else 0.0
        decays.append(decay)
    return decays


def _effective_rate(group: dict[str, Any], decoupled: bool) -> float:
    rate = _full_rate(group)
    return rate if decoupled else rate / (1.0 - float(group.get("momentum", 0.0)))


def rebuild_optimizer(
    factory: Callable[[Iterable[Any]], Optimizer],
    old: Optimizer,
    lr: float | None = None,
    weight_decay: WeightDecay = "map",
) -> Optimizer:
    """A new optimizer on the parameter groups of an old one.

    * Groups keep their parameters, in their order, frozen ones too.
    * The largest rate of all groups becomes ``lr``; the others keep their ratio to it (layer-wise rates survive).
    * An option that both optimizers know and in which the old groups differ stays as it was in each group. Where
      the old groups agree, the new optimizer's own value holds.
    * Weight decay follows ``weight_decay``; a group that had none gets none.

    Args:
        factory: Makes the optimizer from parameter groups, as LightningCLI's ``OptimizerCallable`` does.
        old: The optimizer to take the groups from; not changed.
        lr: Learning rate of the fastest group; ``None`` takes the one the factory sets.
        weight_decay: ``"map"`` translates the old decay with :func:`translate_weight_decay` unless the factory asks
            for a decay of its own; ``"keep"`` takes the old coefficient; ``"optimizer"`` what the factory says.

    Raises:
        MisconfigurationException: If the factory cannot make an optimizer on these parameters.
    """
    try:
        given = {} if lr is None else {"lr": lr}  # some optimizers have no default
        new = factory([{"params": list(group["params"])} | given for group in old.param_groups])
    except (TypeError, ValueError, RuntimeError) as error:
        raise MisconfigurationException(
            f"The new optimizer refuses the parameters of {type(old).__name__}: {error}. Check its arguments, and"
            " whether it can train every parameter of this module (some take matrices only)."
        ) from error
    if not isinstance(new, Optimizer) or "lr" not in new.param_groups[0]:
        raise MisconfigurationException(
            f"The factory of the new optimizer made a {type(new).__name__}, which is no torch optimizer with a learning"
            " rate."
        )
    if len(new.param_groups) != len(old.param_groups):
        raise MisconfigurationException(
            f"{type(new).__name__} turned {len(old.param_groups)} parameter groups into {len(new.param_groups)}; the"
            " factory must pass on the groups it is given."
        )

    rates = group_rates(old)
    fastest = max(rates)
    for group, rate in zip(new.param_groups, rates, strict=True):
        group["lr"] = (group["lr"] if lr is None else lr) * (rate / fastest if fastest else 1.0)

    for key in _options_that_differ(old):
        if key in new.defaults:
            for old_group, new_group in zip(old.param_groups, new.param_groups, strict=True):
                new_group[key] = old_group[key]

    if "weight_decay" in new.defaults:
        _set_weight_decay(old, new, weight_decay)
    return new


def _options_that_differ(optimizer: Optimizer) -> list[str]:
    first, *rest = optimizer.param_groups
    shared = [key for key in first if key not in _NEVER_CARRIED and all(key in group for group in rest)]
    return [key for key in shared if any(group[key] != first[key] for group in rest)]


def _set_weight_decay(old: Optimizer, new: Optimizer, policy: WeightDecay) -> None:
    asked = new.defaults["weight_decay"]
    if policy == "map" and asked != _class_default(type(new), "weight_decay"):
        policy = "optimizer"
    if policy == "map":
        decays = translate_weight_decay(old, new)
    elif policy == "keep":
        decays = [float(group.get("weight_decay", 0.0)) for group in old.param_groups]
    else:
        # Norms and biases are often exempt: a group without decay among others with it stays without.
        exempts = any(group.get("weight_decay", 0.0) for group in old.param_groups)
        decays = [asked if group.get("weight_decay", 0.0) or not exempts else 0.0 for group in old.param_groups]
    for group, decay in zip(new.param_groups, decays, strict=True):
        group["weight_decay"] = decay


def _class_default(optimizer: type[Optimizer], option: str) -> object:
    for cls in optimizer.__mro__:  # a subclass may pass on **kwargs
        if (parameter := inspect.signature(vars(cls).get("__init__", cls)).parameters.get(option)) is not None:
            return parameter.default
    return None


def install(trainer: pl.Trainer, index: int, optimizer: Optimizer, schedulers: Sequence[LRSchedulerConfig]) -> None:
    """Makes the Trainer step ``optimizer`` in place of its optimizer ``index``, between two optimizer steps.

    Schedulers of the replaced optimizer go; those of other optimizers stay where they are. A tip's warm-up that is to
    follow goes on (:func:`~lightning_tips.core.warmup.carry_shares`).

    Args:
        trainer: A trainer in fit, after its strategy is set up.
        index: Position in ``trainer.optimizers``.
        optimizer: The new one.
        schedulers: Its schedulers, which take the place of the old one's.
    """
    strategy = trainer.strategy
    old = strategy.optimizers[index]
    configs: list[LRSchedulerConfig] = []
    pending = list(schedulers)
    for config in strategy.lr_scheduler_configs:
        if config.scheduler.optimizer is not old:
            configs.append(config)
        elif pending:
            configs.append(pending.pop(0))
    # Whole lists are assigned: the setter of `optimizers` renews the wrappers that really step, and a scheduler left
    # in `lr_scheduler_configs` would go on decaying an optimizer that nobody steps.
    carry_shares(old, optimizer)
    strategy.optimizers = [optimizer if i == index else o for i, o in enumerate(strategy.optimizers)]
    strategy.lr_scheduler_configs = configs + pending
