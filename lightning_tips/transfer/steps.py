"""What a phase does to optimizer steps: rates by layer, warm-up, rates by gradient, penalties."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tips.core import ScaledSteps, scale_again, scale_steps, warm_up
from lightning_tips.transfer import checks
from lightning_tips.transfer.layers import HEAD, LayerGroup
from lightning_tips.transfer.penalties import add_pull, pending_loss_scale
from lightning_tips.transfer.rates import (
    add_parameters,
    gradient_shares,
    keep_found_rate,
    layer_scales,
    note_found_rates,
    set_rates,
    split_groups,
)
from lightning_tips.transfer.schedule import Phase


class PhaseSteps:
    """The optimizers of a run, phase by phase. A callback says when.

    Args:
        layer_decay: For phases without one of their own.

    Attributes:
        starts: The weights from which ``l2_sp`` measures, by name; a part of checkpoints.
    """

    def __init__(self, layer_decay: float) -> None:
        self.layer_decay = layer_decay
        self.starts: dict[str, Tensor] = {}
        self._scaled: list[ScaledSteps] = []
        self._announced: set[int] = set()  # optimizers, by id, whose step Lightning has told of
        self._guards: list[RemovableHandle] = []
        self._pulled: dict[int, tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]] = {}
        self._shares: dict[int, list[float] | None] = {}  # by gradient, of the step that is being taken
        self._noted: list[list[float]] = []
        self._groups: Sequence[LayerGroup] = ()

    def prepare(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        groups: Sequence[LayerGroup],
        phases: Sequence[Phase],
        names: Sequence[Sequence[str]],
        now: Phase,
    ) -> None:
        """Brings all that will ever train into the optimizers, once, in groups that can have rates of their own.

        Args:
            trainer: At fit start.
            pl_module: The module.
            groups: Its layers.
            phases: The plan.
            names: The parameters that train, by phase.
            now: The phase that is on.
        """
        self._groups = groups
        self._shares, self._pulled = {}, {}
        parameters = dict(pl_module.named_parameters())
        configs = trainer.lr_scheduler_configs
        wanted = {name: parameters[name] for chosen in names for name in chosen}
        missing = checks.find_missing(trainer, pl_module, wanted)
        if missing:
            add_parameters(trainer.optimizers[0], missing, configs)
        if any(self._decay(phase) != 1.0 or phase.auto_rates for phase in phases):
            checks.check_divisible(trainer.optimizers)
            layers = {id(parameters[n]): i for i, group in enumerate(groups) for n in group.parameters}
            for optimizer in trainer.optimizers:
                split_groups(optimizer, layers, configs)
        note_found_rates(configs)
        self.set_rates(trainer, pl_module, now)
        self._noted = [_rates(optimizer) for optimizer in trainer.optimizers]
        if any(phase.l2_sp for phase in phases) and not self.starts:
            outside = [name for group in groups if group.name != HEAD for name in group.parameters]
            self.starts = {name: parameters[name].detach().clone() for name in outside}
        # A checkpoint's come on the CPU; moved once, not in each step.
        self.starts = {name: start.to(parameters[name].device) for name, start in self.starts.items()}
        if any(phase.l2 or phase.l2_sp or phase.auto_rates or phase.warmup_steps for phase in phases):
            self._guards = [o.register_step_post_hook(self._require_announced) for o in trainer.optimizers]

    def keep_found_rates(self, trainer: pl.Trainer, phase: Phase) -> None:
        """Takes up the rate that a learning rate finder gave to all layers since :meth:`prepare`."""
        for optimizer, noted in zip(trainer.optimizers, self._noted, strict=False):
            keep_found_rate(optimizer, noted, phase.lr is not None)
        note_found_rates(trainer.lr_scheduler_configs)

    def set_rates(self, trainer: pl.Trainer, pl_module: nn.Module, phase: Phase, before: Phase | None = None) -> None:
        """Gives each layer the rate that the phase says, after the phase ``before``."""
        now = self._scales(pl_module, phase)
        then = self._scales(pl_module, before) if before is not None else None
        for optimizer in trainer.optimizers:
            set_rates(optimizer, now, phase.lr, trainer.lr_scheduler_configs, then)

    def _require_announced(self, optimizer: Optimizer, *_: Any) -> None:
        """After the first step: had Lightning been passed by, penalties would be lost and a warm-up never end."""
        if id(optimizer) not in self._announced:
            raise MisconfigurationException(
                "The module steps its optimizer past Lightning (with use_pl_optimizer=False, or one that it made by"
                " hand), so Lightning counts no steps: penalties, auto_rates and warm-up would have no effect, or no"
                " end. Step self.optimizers() as it is, or set probe_l2=0 and warmup_steps=0 and leave the others out."
            )

    def _decay(self, phase: Phase) -> float:
        return self.layer_decay if phase.layer_decay is None else phase.layer_decay

    def _scales(self, pl_module: nn.Module, phase: Phase) -> dict[int, float]:
        parameters = dict(pl_module.named_parameters())
        shares = layer_scales(len(self._groups), self._decay(phase))
        pairs = zip(self._groups, shares, strict=True)
        return {id(parameters[name]): share for group, share in pairs for name in group.parameters}

    def scale(self, trainer: pl.Trainer, phase: Phase, began: int) -> None:
        """Lowers the rates of single steps, as the phase says, and no longer as the one before it said.

        An optimizer that takes the place of another goes on with it.

        Args:
            trainer: The trainer, its optimizers in place.
            phase: The phase that is on.
            began: The step with which it began.
        """
        self._unscale()
        for optimizer in trainer.optimizers:
            if phase.auto_rates:
                self._scaled.append(scale_steps(optimizer, self._shares_of, follows=True))
            if phase.warmup_steps and trainer.global_step - began < phase.warmup_steps:
                done = partial(_steps_since, trainer, began)
                self._scaled.append(warm_up(optimizer, phase.warmup_steps, done, follows=True))

    def _shares_of(self, optimizer: Optimizer) -> list[float] | None:
        return self._shares.get(id(optimizer))

    def before_step(self, trainer: pl.Trainer, pl_module: nn.Module, optimizer: Optimizer, phase: Phase) -> None:
        """Looks at the gradients of the step that is being taken, then adds the penalties of the phase to them."""
        self._announced.add(id(optimizer))
        if phase.auto_rates:
            self._shares = {id(optimizer): gradient_shares(optimizer)}
            scale_again(optimizer)
        if not phase.l2 and not phase.l2_sp:
            return
        if id(optimizer) not in self._pulled:
            self._pulled = {id(o): self._sort(pl_module, o) for o in trainer.optimizers}
        scale = pending_loss_scale(trainer, optimizer)
        head, others = self._pulled[id(optimizer)]
        if phase.l2:
            add_pull(head, {}, phase.l2 * scale)
        if phase.l2_sp:
            add_pull(others, self.starts, phase.l2_sp * scale)

    def _sort(
        self, pl_module: nn.Module, optimizer: Optimizer
    ) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """The head's parameters in an optimizer, and the others'."""
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = {name: p for name, p in pl_module.named_parameters() if id(p) in mine}
        in_head = set(self._groups[-1].parameters)
        head = {name: p for name, p in parameters.items() if name in in_head}
        return head, {name: p for name, p in parameters.items() if name not in in_head}

    def forget_parameters(self) -> None:
        """Something may have replaced parameters."""
        self._pulled = {}

    def leave(self) -> None:
        """Takes everything off the optimizers."""
        self._unscale()
        self._pulled, self._shares, self._noted = {}, {}, []
        for guard in self._guards:
            guard.remove()
        self._guards, self._announced = [], set()

    def _unscale(self) -> None:
        for scaled in self._scaled:
            scaled.remove()
        self._scaled.clear()


def _rates(optimizer: Optimizer) -> list[Any]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _steps_since(trainer: pl.Trainer, began: int) -> int:
    return trainer.global_step - began
