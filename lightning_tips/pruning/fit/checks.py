"""What can be wrong with pruning, said before the first step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.optim import LBFGS
from torch.optim.swa_utils import AveragedModel

from lightning_tips.core import TipCallback, callbacks_of, did_you_mean, require_strategy, say
from lightning_tips.core.lightning_private import starts_processes
from lightning_tips.pruning.filters.prune import plan_filters
from lightning_tips.pruning.fit.schedule import Schedule
from lightning_tips.pruning.networks.measure import check_goal

GIVEN = {
    *("model", "example_inputs", "criterion", "target", "filters", "scope", "round_to", "batches", "forward", "loss"),
    *("score_forward", "reduce", "reference", "channels"),
}
CRITERIA = (
    "l1",
    "l2",
    "mean_activation",
    "apoz",
    "taylor",
    "bn_scale",
    "geometric_median",
    "random",
)
TARGETS = ("macs", "params", "filters", "latency")


def check_target(target: Mapping[str, float]) -> dict[str, float]:
    """The target as plain numbers.

    Raises:
        ValueError: For an unknown kind, a share that is none, or a latency that is no share.
    """
    if not target:
        raise ValueError("target is empty; it is, for example, {'macs': 0.5}.")
    for name, value in target.items():
        if name not in TARGETS:
            raise ValueError(f"target has no {name!r}. {did_you_mean(str(name), TARGETS)}")
        if name == "latency" and value >= 1:
            raise ValueError(f"target['latency']={value!r} must be a share in (0, 1) of the unpruned network's.")
        check_goal(name, value)
    return {name: float(value) for name, value in target.items()}


def check_arguments(**numbers: Any) -> None:
    """Raises ValueError for arguments of the callback that make no sense."""
    drop, on_drop, mode = numbers["max_drop"], numbers["on_drop"], numbers["mode"]
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r} must be 'min' or 'max'.")
    if on_drop not in ("stop", "smaller"):
        raise ValueError(f"on_drop={on_drop!r} must be 'stop' or 'smaller'.")
    if drop is not None and not (math.isfinite(drop) and drop >= 0):
        raise ValueError(f"max_drop={drop!r} must be 0 or more, in units of the metric.")
    if not (math.isfinite(numbers["distill"]) and numbers["distill"] >= 0):
        raise ValueError(f"distill={numbers['distill']!r} must be 0 or more.")
    if not (math.isfinite(numbers["temperature"]) and numbers["temperature"] > 0):
        raise ValueError(f"temperature={numbers['temperature']!r} must be above 0.")
    if numbers["samples"] < 2:
        raise ValueError(f"samples={numbers['samples']!r} must be 2 or more.")


def check_filters(filters_per_step: int | float | None) -> None:
    """Raises ValueError unless it is a count, a share below 1, or nothing."""
    if filters_per_step is None:
        return
    count = isinstance(filters_per_step, int) and filters_per_step >= 1
    share = isinstance(filters_per_step, float) and 0 < filters_per_step < 1
    if isinstance(filters_per_step, bool) or not (count or share):
        raise ValueError(f"filters_per_step={filters_per_step!r} must be a count of 1 or more, or a share below 1.")


def check_criterion(criterion: Any) -> None:
    """Raises ValueError for a criterion that nobody knows."""
    if not callable(criterion) and criterion not in CRITERIA:
        raise ValueError(f"criterion={criterion!r} is unknown. {did_you_mean(str(criterion), CRITERIA)}")


def check_plan(plan: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments of ``plan_filters`` that it does not have, or that the callback gives itself."""
    known = set(inspect.signature(plan_filters).parameters) - GIVEN
    for name in plan:
        if name not in known:
            raise ValueError(f"plan has no {name!r}, or the callback sets it. {did_you_mean(str(name), known)}")


def conflict(other: object) -> str | None:
    """Why pruning cannot go on beside another callback, or ``None``."""
    if isinstance(other, WeightAveraging | StochasticWeightAveraging):
        return (
            "it keeps a copy of the weights in the shapes that they had at the start. Prune first, and average the"
            " weights in a run that goes on from the pruned checkpoint (load_pruned)."
        )
    if isinstance(other, ModelPruning):
        return "it masks single weights of tensors that change their shape. Take one of them."
    if isinstance(other, TipCallback) and (reason := other.keeps_shapes()):
        return f"{reason}, and these change. Run one after the other: the second one goes on from load_pruned."
    return None


def why_nothing(module: nn.Module) -> str:
    """Why there is nothing to prune in a module in which no convolution was found."""
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        return "a scripted network cannot be pruned; use the nn.Module that it was made from."
    return f"{type(module).__name__} has no convolution, so there is nothing to prune."


def check_run(trainer: pl.Trainer, tip: object) -> None:
    """Raises for a strategy under which a network cannot change its shape."""
    require_strategy(trainer, tip, SingleDeviceStrategy, DDPStrategy)
    if starts_processes(trainer.strategy):
        raise MisconfigurationException(
            f"{type(tip).__name__} does not work with processes that the Trainer spawns or forks: Lightning brings"
            " their weights back into a network of the old shape. Use strategy='ddp'."
        )


def check_step(module: pl.LightningModule, tip: object) -> None:
    """Raises for a training step whose batches nobody can see before it runs."""
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"{type(tip).__name__} looks at batches before they are trained on, and training_step of"
            f" {type(module).__name__} takes them from a dataloader_iter by itself. Let it take a batch."
        )


def check_averages(trainer: pl.Trainer, module: nn.Module, network: nn.Module, tip: object) -> None:
    """Raises for an average of the network's weights (EMA) in the module or a callback, and names what may be one.

    Its shapes would not be the network's any more. Averages of parts of the network, or of what it is a part of, too.
    Any other copy may as well be an independent network or a teacher.
    """
    held: dict[str, Any] = {f"{type(module).__name__}.{name}": part for name, part in module.named_modules()}
    for callback in callbacks_of(trainer):
        held |= {f"{type(callback).__name__}.{name}": value for name, value in vars(callback).items()}
    inside = set(network.modules())
    averages = {part for value in held.values() if (inner := _averaged(value)) is not None for part in inner.modules()}
    related = [part for part in module.modules() if part in inside or network in set(part.modules())]
    own, shapes = {*related}, [_shapes(part) for part in related if part not in averages]
    whole = _shapes(network)
    for name, part in held.items():
        inner = _averaged(part)
        if inner is not None and (held_shapes := _shapes(inner)) and held_shapes in shapes:
            raise MisconfigurationException(
                f"{type(tip).__name__}: {name} averages the network's weights in the shapes that they have now, and"
                " these change. Prune first, and average in a run that goes on from the pruned checkpoint"
                " (load_pruned)."
            )
        if isinstance(part, nn.Module) and part not in own and _shapes(part) == whole:
            own.add(part)
            inside_module = name.startswith(f"{type(module).__name__}.")
            if not (inside_module and any(parameter.requires_grad for parameter in part.parameters())):
                say(trainer, f"{name} has the network's shapes, and keeps them: an average of its weights fails.")


def _averaged(held: Any) -> nn.Module | None:
    """What torch's, or timm's, average of a module has inside; ``None`` for anything else."""
    if isinstance(held, AveragedModel):
        return held.module
    if type(held).__name__.startswith("ModelEma"):
        inner = getattr(held, "module", getattr(held, "ema", None))  # the first one of timm is no module
        return inner if isinstance(inner, nn.Module) else None
    return None


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in module.named_parameters()]


def check_optimizers(trainer: pl.Trainer, tip: object) -> None:
    """Raises for an optimizer whose state has nothing to do with the shapes of single parameters."""
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, LBFGS):
            raise MisconfigurationException(
                f"{type(tip).__name__} does not work with {type(optimizer).__name__}, which keeps its history for all"
                " parameters together, so that it cannot be cut with them. Use SGD, Adam, AdamW, RMSprop, ..."
            )


def warn_if_never(trainer: pl.Trainer, schedule: Schedule | None, next_epoch: int) -> None:
    """Warns when the run ends before the last step, and its fine-tuning; without a schedule, before the first."""
    epochs = _epochs(trainer)
    if epochs is None or getattr(trainer, "fast_dev_run", False):
        return
    if schedule is None:
        if next_epoch >= epochs:
            rank_zero_warn(
                f"Nothing will be pruned: the first step is due in epoch {next_epoch}, and the run ends after {epochs}."
                " Begin earlier, or train for longer."
            )
    elif next_epoch <= schedule.last_epoch and schedule.last_epoch >= epochs:
        rank_zero_warn(
            f"The target is not reached: the last pruning step is due in epoch {schedule.last_epoch}, and the run ends"
            f" after {epochs}. Take fewer steps, a smaller every_n_epochs, or train for longer."
        )


def _epochs(trainer: pl.Trainer) -> int | None:
    """After how many epochs the run ends at the latest, by ``max_epochs`` or by ``max_steps``; ``None`` if unknown.

    Its loaders are there, but nothing has been trained. How long ``max_time`` lasts is not known.
    """
    known = [] if trainer.max_epochs is None or trainer.max_epochs < 0 else [trainer.max_epochs]
    batches = trainer.num_training_batches
    schedulers = [c for c in callbacks_of(trainer) if isinstance(c, GradientAccumulationScheduler)]
    same = trainer.lightning_module.automatic_optimization and not any(
        scheduler.going_to_accumulate_grad_batches() for scheduler in schedulers
    )  # the number of steps in each epoch
    if trainer.max_steps >= 0 and same and 0 < batches < math.inf:
        each = math.ceil(batches / trainer.accumulate_grad_batches)
        # A resumed run may be in the middle of an epoch.
        done = (trainer.fit_loop.epoch_loop.batch_idx + 1) // trainer.accumulate_grad_batches
        known.append(trainer.current_epoch + math.ceil((done + trainer.max_steps - trainer.global_step) / each))
    return min(known, default=None)
