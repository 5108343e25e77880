"""`TransferLearningCallback`: train the head of a pretrained network, then thaw the layers before it."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tips.core import ActsOn, Monitor, TipCallback, require_strategy, wrap_again
from lightning_tips.transfer import checks
from lightning_tips.transfer.features import PhaseFeatures
from lightning_tips.transfer.freeze import BatchNormPolicy, Frozen, Held, modules_to_hold, set_trainable
from lightning_tips.transfer.heads import find_network
from lightning_tips.transfer.inputs import watch_images
from lightning_tips.transfer.layers import LayerGroup, layer_groups, match_parameters
from lightning_tips.transfer.progress import Progress
from lightning_tips.transfer.schedule import PRESETS, Phase, preset_phases, write_plan
from lightning_tips.transfer.steps import PhaseSteps


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
        cache_features: Whether to run frozen layers once for each image, in phases in which only the head trains, and
            to keep what they make of it. For data without augmentation; where images differ in each epoch, or frozen
            layers drop out, it gives up with a warning. A resumed run computes them anew.
        cache_gigabytes: Memory for that in each process, where the features are computed.

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
        cache_features: bool = False,
        cache_gigabytes: float = 2.0,
    ) -> None:
        self.schedule = schedule
        self.backbone = backbone
        self.head = head
        self.layer_decay = layer_decay
        self.batch_norm: BatchNormPolicy = batch_norm
        self.check_inputs = check_inputs
        self.cache_features = cache_features
        self.cache_gigabytes = cache_gigabytes
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
        checks.check_arguments(layer_decay, batch_norm, cache_gigabytes, self._preset)
        self._given: list[Phase] | None = None
        if not (isinstance(schedule, str) and schedule in PRESETS):
            self._given = checks.read_schedule(schedule)
            checks.warn_of_unread(type(self), self._preset, "phases of its own", "say it in the phases")
        elif schedule == "head_only":  # one phase, of one layer group
            later = {name: value for name, value in self._preset.items() if name != "probe_l2"}
            later["layer_decay"] = layer_decay
            checks.warn_of_unread(type(self), later, "schedule='head_only'", "take it away, or take another schedule")
        several = self._given is None and schedule != "head_only"
        metrics = [phase.monitor for phase in self._given or []] + ([monitor] if several else [])
        self._monitors = {m: Monitor(m, type(self).__name__) for m in dict.fromkeys(metrics) if m is not None}
        self._steps = PhaseSteps(layer_decay)
        self._held = Held()
        self._frozen = Frozen(type(self).__name__)
        self._features = PhaseFeatures((type(self).__name__, self.tip), cache_gigabytes)
        self._watch: list[RemovableHandle] = []  # on the networks' first input
        self._were_trainable: list[nn.Parameter] = []
        self._groups: list[LayerGroup] = []
        self._phases: list[Phase] = list(self._given or [])
        self._names: list[list[str]] = []  # the parameters that train, by phase
        self.reset()

    @property
    def phase(self) -> Phase | None:
        """The phase that is on; known from the start of the fit."""
        return self._phases[self._progress.number] if self._phases else None

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
        self._progress = Progress()
        self._saved_plan: list[dict[str, Any]] | None = None
        self._steps.starts = {}
        for monitor in self._monitors.values():
            monitor.reset()

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return super().state_dict() | {
            "plan": [phase.to_dict() for phase in self._phases],
            **self._progress.state_dict(),
            "monitors": {name: monitor.state_dict() for name, monitor in self._monitors.items()},
            "starts": dict(self._steps.starts),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`; layers and optimizer follow in ``on_fit_start``."""
        self._progress.load_state_dict(state, self._phases)
        self._saved_plan = list(state["plan"])
        self._steps.starts = dict(state["starts"])
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

    def keeps_shapes(self) -> str | None:
        """The starting point that ``l2_sp`` pulls towards."""
        pulls = any(phase.l2_sp for phase in self._given) if self._given else self._preset["l2_sp"]
        return "l2_sp keeps the weights in the shapes that they started with" if pulls else None

    def keeps_names(self) -> str | None:
        """The layers that each phase trains, and the optimizer's groups by layer."""
        return "phases and learning rates belong to the layers that are there at the start"

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks what can be known before anything is built. All layers still train, so any optimizer gets them."""
        require_strategy(trainer, self, SingleDeviceStrategy, DDPStrategy)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the layers, brings them all into the optimizer, and freezes those that are not to train yet."""
        try:
            self._groups = layer_groups(pl_module, self.backbone, self.head)
            self._phases = self.plan(pl_module)
            network = find_network(pl_module, self.backbone)
            trains = {name for name, p in pl_module.named_parameters() if p.requires_grad}
            named = [match_parameters(self._groups, phase.train, network) for phase in self._phases]
            pairs = zip(named, self._phases, strict=True)
            self._names = [checks.require_some(names, trains, phase) for names, phase in pairs]
            if self.cache_features:
                given = self.batch_norm, self.backbone, self.head
                self._features.prepare(pl_module, self._groups, self._phases, self._names, *given)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        checks.check_saved_plan(self._saved_plan, self._phases, self._progress.number)
        checks.warn_if_never(trainer, self._phases)
        checks.warn_if_nothing_new(self._phases, named, self._names)
        checks.warn_if_last_ends(trainer, self._phases)
        self._were_trainable = [p for p in pl_module.parameters() if p.requires_grad]
        now = self._phases[self._progress.number]
        self._progress.gate(now)
        self._steps.prepare(trainer, pl_module, self._groups, self._phases, self._names, now)
        self._apply(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the first phase, or goes on in the one that a checkpoint was written in."""
        self._held.hold()  # not before: Lightning warns of modules that it finds in eval mode
        super().on_train_start(trainer, pl_module)
        for monitor in self._monitors.values():
            monitor.on_train_start(trainer)
        if trainer.global_step == 0:
            self._steps.keep_found_rates(trainer, self._phases[0])
            if self.check_inputs:
                network = pl_module.get_submodule(find_network(pl_module, self.backbone))
                self._watch = watch_images(network, type(self).__name__)
        self._scale_steps(trainer)
        self._features.begin(trainer, pl_module, self._progress.number)
        if not self.events:
            self._record(trainer)

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
                self._progress.decide(self._phases, name, monitor.on_validation_end(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decides, if the metric is one of training."""
        for name, monitor in self._monitors.items():
            self._progress.decide(self._phases, name, monitor.on_train_epoch_end(trainer))

    def start_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins the next phase, if its time has come."""
        for monitor in self._monitors.values():
            monitor.on_train_epoch_start(trainer)
        if self._progress.due(self._phases, trainer.current_epoch):
            self._begin(trainer, pl_module)
        self._held.hold()
        self._features.start_epoch()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the buffers of frozen layers as they are, whoever called ``train()``."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._held.hold_if_moved()

    def on_train_batch_end(self, *args: Any) -> None:
        """After the first batch there is nothing to look at any more."""
        self._stop_watching()

    # ---- the thaw

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before = self._phases[self._progress.number]
        self._progress.advance(self._phases, trainer.current_epoch, trainer.global_step)
        self._steps.set_rates(trainer, pl_module, self._phases[self._progress.number], before)
        self._apply(trainer, pl_module)
        self._scale_steps(trainer)
        self._features.begin(trainer, pl_module, self._progress.number)
        self._record(trainer)

    def _record(self, trainer: pl.Trainer) -> None:
        phase = self._phases[self._progress.number]
        parameters = list(trainer.lightning_module.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        details = {"trainable": trainable, "share": trainable / max(1, sum(p.numel() for p in parameters))}
        rates = [float(g["lr"]) for o in trainer.optimizers for g in o.param_groups if _trains(g)]
        self.record(trainer, f"{phase.name}: {', '.join(phase.train)} train", **details, lr=max(rates, default=0.0))

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the module what the phase says."""
        phase = self._phases[self._progress.number]
        names = self._names[self._progress.number]
        before = {name for name, p in pl_module.named_parameters() if p.requires_grad}
        set_trainable(pl_module, names)
        if before != {name for name, p in pl_module.named_parameters() if p.requires_grad}:
            wrap_again(trainer.strategy, pl_module)
        self._frozen.keep(pl_module)
        self._held.want(modules_to_hold(pl_module, self._groups, names, phase.batch_norm or self.batch_norm))
        self._steps.forget_parameters()

    def _scale_steps(self, trainer: pl.Trainer) -> None:
        self._steps.scale(trainer, self._phases[self._progress.number], self._progress.step)

    # ---- steps

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """What trains must have a part in the loss."""
        checks.check_loss(loss, self._phases[self._progress.number], self._names[self._progress.number])

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Adds the penalties of the phase to the gradients, and takes the rates from them, if the phase asks for it.

        Frozen layers have none, whatever the module has done to them.
        """
        self._frozen.freeze_again()
        self._steps.before_step(trainer, pl_module, optimizer, self._phases[self._progress.number])

    # ---- the end

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says what became of the features."""
        self._features.let_go(trainer)
        super().on_fit_end(trainer, pl_module)

    def release(self) -> None:
        """Leaves the module as it was found, but for its weights."""
        super().release()
        self._features.let_go()
        self._steps.leave()
        self._held.leave()
        self._stop_watching()
        for parameter in self._were_trainable:
            parameter.requires_grad_(True)
        self._were_trainable = []

    def _stop_watching(self) -> None:
        for handle in self._watch:
            handle.remove()
        self._watch = []


def _trains(group: dict[str, Any]) -> bool:
    return any(p.requires_grad for p in group["params"])
