"""`TransferLearningCallback`: train the head of a pretrained network, then thaw the layers before it."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tips.core import (
    ActsOn,
    Monitor,
    ScaledSteps,
    TipCallback,
    require_strategy,
    scale_steps,
    warm_up,
    wrap_again,
)
from lightning_tips.transfer import checks
from lightning_tips.transfer.freeze import BatchNormPolicy, hold, modules_to_hold, release, set_trainable
from lightning_tips.transfer.inputs import check_images, expected_inputs
from lightning_tips.transfer.layers import HEAD, LayerGroup, find_network, layer_groups, match_parameters
from lightning_tips.transfer.rates import (
    add_parameters,
    add_pull,
    gradient_shares,
    layer_scales,
    set_rates,
    split_groups,
)
from lightning_tips.transfer.schedule import PRESETS, Gate, Phase, preset_phases, write_plan


class TransferLearningCallback(TipCallback):
    """Trains a pretrained network in phases: first its head, while the layers before it are frozen, then more of it.

    Works with any network in any LightningModule. A frozen layer keeps its parameters and buffers to the bit and costs
    no gradient. When a phase ends is decided after a validation; the next one begins at the start of the next training
    epoch. What the module itself froze before the fit stays frozen.

    Args:
        schedule: ``"lp_ft"``: the head alone (linear probe), then all layers (Kumar et al. 2022, arXiv 2202.10054).
            ``"gradual"``: the head, then one layer group more in each phase, last to first. ``"head_only"``. Or
            phases: a list of :class:`Phase`, or the path of a yaml file with such a list.
        backbone: Name of the pretrained part of the module, where it is not found by itself; ``fnmatch`` patterns too.
        head: Name of the head, likewise.
        layer_decay: Each layer group gets this share of the learning rate of the group after it.
        batch_norm: ``"frozen"``: BatchNorm keeps its statistics, in frozen layers and in thawed ones too, except in the
            head. ``"stats"``: it estimates them anew everywhere (then buffers of frozen layers change, and nothing else
            of theirs). ``"live"``: kept in frozen layers only.
        phase_epochs: Length of each phase but the last, for a schedule given by name.
        monitor: Logged metric that ends phases instead, likewise.
        mode: ``"min"`` or ``"max"``, for ``monitor``.
        patience: For so many validations the metric does not improve.
        fine_tune_lr: Learning rate from the second phase on, for a schedule given by name; by default the optimizer's
            own. A schedule of the module's comes on top.
        warmup_steps: Optimizer steps over which the rate rises at the start of these phases, likewise.
        probe_l2: L2 penalty on the head while it is trained alone, likewise: one that is fitted without it may have
            weights so large that fine-tuning diverges.
        l2_sp: Penalty on the distance of all other layers from where they started (Li et al. 2018, arXiv 1802.01483),
            likewise.
        check_inputs: Whether to look at the first batch for the normalisation and size that the weights expect.

    Raises:
        ValueError: For arguments and phases that make no sense.
        MisconfigurationException: Before the first step, for layers that are not there, and for a strategy, callback or
            optimizer it cannot work with.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> transfer = TransferLearningCallback("lp_ft", phase_epochs=3, layer_decay=0.8)
        >>> trainer = Trainer(callbacks=[transfer], logger=False, accelerator="cpu")
    """

    tip = "transfer"
    acts_on = ActsOn.TRAINABLE

    def __init__(
        self,
        schedule: list[Phase] | str = "lp_ft",
        backbone: str | None = None,
        head: str | None = None,
        layer_decay: float = 1.0,
        batch_norm: BatchNormPolicy = "frozen",
        phase_epochs: int = 1,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        fine_tune_lr: float | None = None,
        warmup_steps: int = 20,
        probe_l2: float = 1e-3,
        l2_sp: float = 0.0,
        check_inputs: bool = True,
    ) -> None:
        self.schedule = schedule
        self.backbone = backbone
        self.head = head
        self.layer_decay = layer_decay
        self.batch_norm: BatchNormPolicy = batch_norm
        self.check_inputs = check_inputs
        self._preset: dict[str, Any] = {
            "phase_epochs": phase_epochs,
            "monitor": monitor,
            "mode": mode,
            "patience": patience,
            "fine_tune_lr": fine_tune_lr,
            "warmup_steps": warmup_steps,
            "probe_l2": probe_l2,
            "l2_sp": l2_sp,
        }
        checks.check_arguments(layer_decay, batch_norm, self._preset)
        self._given: list[Phase] | None = None
        if not (isinstance(schedule, str) and schedule in PRESETS):
            self._given = checks.read_schedule(schedule)
            checks.warn_of_unread(type(self), self._preset)
        metrics = [phase.monitor for phase in self._given or []] + ([] if self._given else [monitor])
        self._monitors = {m: Monitor(m, type(self).__name__) for m in dict.fromkeys(metrics) if m is not None}
        self._left: list[RemovableHandle] = []  # hooks to take off at the end
        self._scaled: list[ScaledSteps] = []  # the steps of this phase
        self._held: list[nn.Module] = []  # in eval mode because of this tip
        self._to_hold: list[nn.Module] = []
        self._were_trainable: list[nn.Parameter] = []
        self._groups: list[LayerGroup] = []
        self._phases: list[Phase] = list(self._given or [])
        self._names: list[list[str]] = []  # the parameters that train, by phase
        self._pulled: dict[int, tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]] = {}
        self.reset()

    @property
    def phase(self) -> Phase | None:
        """The phase that is on; known from the start of the fit."""
        return self._phases[self._number] if self._phases else None

    def describe(self) -> str:
        """For the table at fit start."""
        phases = "; then ".join(phase.describe() for phase in self._phases)
        return f"{phases}; batch norm {self.batch_norm}"

    def plan(self, module: nn.Module) -> list[Phase]:
        """The phases that a module would be trained in."""
        groups = layer_groups(module, self.backbone, self.head)
        return self._given or preset_phases(str(self.schedule), groups, **self._preset)

    def write_plan(self, path: str, module: nn.Module) -> None:
        """Writes the phases as yaml, to be edited and given as ``schedule``, with the module's layer groups."""
        write_plan(path, self.plan(module), layer_groups(module, self.backbone, self.head))

    # ---- state

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self._number = 0
        self._began = [0, 0]  # epoch and step
        self._pending = False
        self._gate: Gate | None = None
        self._gate_state: dict[str, Any] | None = None
        self._saved_plan: list[dict[str, Any]] | None = None
        self._starts: dict[str, Tensor] = {}
        for monitor in self._monitors.values():
            monitor.reset()

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return super().state_dict() | {
            "plan": [phase.to_dict() for phase in self._phases],
            "phase": self._number,
            "began": list(self._began),
            "pending": self._pending,
            "gate": self._gate.state_dict() if self._gate is not None else None,
            "monitors": {name: monitor.state_dict() for name, monitor in self._monitors.items()},
            "starts": dict(self._starts),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`; layers and optimizer follow in ``on_fit_start``."""
        self._number = int(state["phase"])
        self._began = [int(n) for n in state["began"]]
        self._pending = bool(state["pending"])
        self._saved_plan = list(state["plan"])
        self._gate, self._gate_state = None, state["gate"]
        if self._phases and self._number < len(self._phases):
            self._make_gate()
        self._starts = dict(state["starts"])
        for name, monitor in self._monitors.items():
            if name in state["monitors"]:
                monitor.load_state_dict(state["monitors"][name])

    # ---- before the first step

    def conflict_with(self, other: object) -> str | None:
        """Two that freeze and thaw undo each other; SWA ends by estimating all statistics of BatchNorm anew."""
        if isinstance(other, BaseFinetuning):
            return "both decide which layers train. Take one of them."
        if isinstance(other, StochasticWeightAveraging):
            return (
                "it sets all learning rates itself and ends by estimating BatchNorm's statistics anew, those of frozen"
                " layers too. EMAWeightAveraging and WeightAveraging average the weights without that; use one of them."
            )
        return None

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks what can be known before anything is built. All layers still train, so any optimizer gets them."""
        require_strategy(trainer, self, SingleDeviceStrategy, DDPStrategy)
        self._leave()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the layers, brings them all into the optimizer, and freezes those that are not to train yet."""
        try:
            self._groups = layer_groups(pl_module, self.backbone, self.head)
            self._phases = self.plan(pl_module)
            network = find_network(pl_module, self.backbone)
            trains = {name for name, p in pl_module.named_parameters() if p.requires_grad}
            self._names = [
                checks.require_some(match_parameters(self._groups, phase.train, network), trains, phase)
                for phase in self._phases
            ]
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        checks.check_saved_plan(self._saved_plan, self._phases, self._number)
        checks.warn_if_never(trainer, self._phases)
        self._were_trainable = [p for p in pl_module.parameters() if p.requires_grad]
        if self._gate is None:
            self._make_gate()
        self._prepare_optimizers(trainer, pl_module)
        if any(phase.l2_sp for phase in self._phases) and not self._starts:
            outside = [name for group in self._groups if group.name != HEAD for name in group.parameters]
            parameters = dict(pl_module.named_parameters())
            self._starts = {name: parameters[name].detach().cpu().clone() for name in outside}
        self._apply(trainer, pl_module)

    def _prepare_optimizers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All that will ever train, exactly once and in groups that can have rates of their own."""
        parameters = dict(pl_module.named_parameters())
        wanted = {name: parameters[name] for names in self._names for name in names}
        configs = trainer.lr_scheduler_configs
        missing = checks.find_missing(trainer, pl_module, wanted)
        if missing:
            add_parameters(trainer.optimizers[0], missing, configs)
        if any(self._decay(phase) != 1.0 or phase.auto_rates for phase in self._phases):
            checks.check_divisible(trainer.optimizers)
            layers = {id(parameters[n]): i for i, group in enumerate(self._groups) for n in group.parameters}
            for optimizer in trainer.optimizers:
                split_groups(optimizer, layers, configs)
        self._set_rates(trainer, pl_module, None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the first phase, or goes on in the one that a checkpoint was written in."""
        self._hold()  # not before: Lightning warns of modules that it finds in eval mode
        super().on_train_start(trainer, pl_module)
        for monitor in self._monitors.values():
            monitor.on_train_start(trainer)
        self._scale_steps(trainer)
        if trainer.global_step == 0:
            self._watch_inputs(pl_module)
        if not self.events:
            self._record(trainer)

    def _watch_inputs(self, pl_module: pl.LightningModule) -> None:
        network = pl_module.get_submodule(find_network(pl_module, self.backbone))
        expected = expected_inputs(network) if self.check_inputs else None
        if expected is None:
            return

        def look(network: nn.Module, args: tuple[Any, ...]) -> None:
            if network.training and args and isinstance(args[0], Tensor):
                handle.remove()
                for finding in check_images(args[0], expected):
                    rank_zero_warn(f"{type(self).__name__}: {finding} (check_inputs=False for silence)")

        handle = network.register_forward_pre_hook(look)
        self._left.append(handle)

    # ---- when

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Metrics are looked for before and after validation."""
        if trainer.state.fn == TrainerFn.FITTING:
            for monitor in self._monitors.values():
                monitor.on_validation_start(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decides, if validation logs the metric."""
        if trainer.state.fn == TrainerFn.FITTING:
            for name, monitor in self._monitors.items():
                self._decide(name, monitor.on_validation_end(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decides, if the metric is one of training."""
        for name, monitor in self._monitors.items():
            self._decide(name, monitor.on_train_epoch_end(trainer))

    def _decide(self, metric: str, value: float | None) -> None:
        phase = self._phases[self._number]
        if value is None or self._gate is None or phase.monitor != metric or self._number == len(self._phases) - 1:
            return
        if self._gate.update(value):
            self._pending = True

    def _make_gate(self) -> None:
        phase = self._phases[self._number]
        self._gate = Gate(phase.mode, phase.patience, phase.min_delta) if phase.monitor else None
        if self._gate is not None and self._gate_state is not None:
            self._gate.load_state_dict(self._gate_state)
        self._gate_state = None

    def start_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins the next phase, if its time has come."""
        for monitor in self._monitors.values():
            monitor.on_train_epoch_start(trainer)
        if self._due(trainer.current_epoch):
            self._begin(trainer, pl_module)
        self._hold()

    def _due(self, epoch: int) -> bool:
        if self._number == len(self._phases) - 1:
            return False
        phase, following = self._phases[self._number : self._number + 2]
        over = phase.epochs is not None and epoch >= self._began[0] + phase.epochs
        return self._pending or over or (following.start is not None and epoch >= following.start)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the buffers of frozen layers as they are, whoever called ``train()``."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        for module in self._to_hold:
            if module.training:
                self._hold()
                break

    # ---- the thaw

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before = self._phases[self._number]
        self._number += 1
        self._began = [trainer.current_epoch, trainer.global_step]
        self._pending = False
        self._gate_state = None
        self._make_gate()
        self._set_rates(trainer, pl_module, before)
        self._apply(trainer, pl_module)
        self._scale_steps(trainer)
        self._record(trainer)

    def _record(self, trainer: pl.Trainer) -> None:
        phase = self._phases[self._number]
        parameters = list(trainer.lightning_module.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        details = {"trainable": trainable, "share": trainable / max(1, sum(p.numel() for p in parameters))}
        rates = [float(g["lr"]) for o in trainer.optimizers for g in o.param_groups if _trains(g)]
        self.record(trainer, f"{phase.name}: {', '.join(phase.train)} train", **details, lr=max(rates, default=0.0))

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the module what the phase says."""
        phase = self._phases[self._number]
        names = self._names[self._number]
        before = {name for name, p in pl_module.named_parameters() if p.requires_grad}
        set_trainable(pl_module, names)
        if before != {name for name, p in pl_module.named_parameters() if p.requires_grad}:
            wrap_again(trainer.strategy, pl_module)
        self._to_hold = modules_to_hold(pl_module, self._groups, names, phase.batch_norm or self.batch_norm)
        kept = {id(module) for module in self._to_hold}
        release(module for module in self._held if id(module) not in kept)
        self._held = [module for module in self._held if id(module) in kept]
        self._pulled = {}

    def _hold(self) -> None:
        known = {id(module) for module in self._held}
        self._held += [module for module in hold(self._to_hold) if id(module) not in known]

    def _decay(self, phase: Phase) -> float:
        return self.layer_decay if phase.layer_decay is None else phase.layer_decay

    def _set_rates(self, trainer: pl.Trainer, pl_module: pl.LightningModule, before: Phase | None) -> None:
        phase = self._phases[self._number]
        now = self._scales(pl_module, phase)
        then = self._scales(pl_module, before) if before is not None else None
        for optimizer in trainer.optimizers:
            set_rates(optimizer, now, phase.lr, trainer.lr_scheduler_configs, then)

    def _scales(self, pl_module: nn.Module, phase: Phase) -> dict[int, float]:
        parameters = dict(pl_module.named_parameters())
        shares = layer_scales(len(self._groups), self._decay(phase))
        pairs = zip(self._groups, shares, strict=True)
        return {id(parameters[name]): share for group, share in pairs for name in group.parameters}

    def _scale_steps(self, trainer: pl.Trainer) -> None:
        _remove(self._scaled)
        if self._phases[self._number].auto_rates:
            self._scaled += [scale_steps(optimizer, gradient_shares) for optimizer in trainer.optimizers]
        steps, began = self._phases[self._number].warmup_steps, self._began[1]
        if steps and trainer.global_step - began < steps:
            for optimizer in trainer.optimizers:
                self._scaled.append(warm_up(optimizer, steps, lambda: trainer.global_step - began))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Adds the penalties of the phase to the gradients."""
        phase = self._phases[self._number]
        if not phase.l2 and not phase.l2_sp:
            return
        if id(optimizer) not in self._pulled:
            self._pulled[id(optimizer)] = self._sort(pl_module, optimizer)
        head, others = self._pulled[id(optimizer)]
        if phase.l2:
            add_pull(head, {}, phase.l2)
        if phase.l2_sp:
            add_pull(others, self._starts, phase.l2_sp)

    def _sort(
        self, pl_module: nn.Module, optimizer: Optimizer
    ) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """The head's parameters in an optimizer, and the others'."""
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = {name: p for name, p in pl_module.named_parameters() if id(p) in mine}
        in_head = set(self._groups[-1].parameters)
        head = {name: p for name, p in parameters.items() if name in in_head}
        return head, {name: p for name, p in parameters.items() if name not in in_head}

    # ---- the end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the module as it was found, but for its weights."""
        super().on_exception(trainer, pl_module, exception)
        self._leave()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module as it was found, but for its weights."""
        self._leave()

    def _leave(self) -> None:
        _remove(self._left)
        _remove(self._scaled)
        release(self._held)
        for parameter in self._were_trainable:
            parameter.requires_grad_(True)
        self._held, self._to_hold, self._were_trainable, self._pulled = [], [], [], {}


def _trains(group: dict[str, Any]) -> bool:
    return any(p.requires_grad for p in group["params"])


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
