"""`LayerPruningCallback`: take whole residual blocks out, fine-tune, repeat."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from lightning_tips.core import TipCallback, did_you_mean, leaves_files, render_table, report_folder, say
from lightning_tips.core.tip import belongs_to
from lightning_tips.pruning.blocks.find import find_blocks
from lightning_tips.pruning.blocks.optimizers import configure_with_blocks, keep_parameters
from lightning_tips.pruning.blocks.remove import TARGETS, check_target, plan_blocks, take_out
from lightning_tips.pruning.fit.block_metric import RanksByMetric
from lightning_tips.pruning.fit.capture import Inputs, call_network, networks_in
from lightning_tips.pruning.fit.distillation import Task
from lightning_tips.pruning.fit.report import cost_rows
from lightning_tips.pruning.fit.schedule import Schedule, Shape, steps_until
from lightning_tips.pruning.networks.copies import COMPILED
from lightning_tips.pruning.networks.measure import Cost, count_cost
from lightning_tips.pruning.networks.runs import untouched

CRITERIA = ("metric", "outputs", "branch_norm")


class LayerPruningCallback(RanksByMetric):
    """Makes a residual network shallower and faster while it trains: blocks that it hardly misses are taken out.

    Works with any network whose blocks are ``activation(x + f(x))`` in the shape of ``x``: ResNets, inverted residuals,
    ConvNeXt, vision transformers and others, found by what they compute. Residual networks hardly notice the loss of a
    block (Veit et al. 2016, arXiv 1605.06431), and at batch 1 fewer layers are what makes them faster.

    At the start of an epoch blocks are ranked and taken out one by one, anew after each, until the step's share of the
    way is done; it is tried on a copy first. The parameters leave the optimizers, BatchNorm's statistics are estimated
    anew, DDP is made anew, and the epochs that follow fine-tune.

    Args:
        criterion: What makes a block important. On inputs kept from training: ``"outputs"``, how far the network's
            outputs move without it; ``"branch_norm"``, how much it changes its input. ``"metric"``: by how much
            ``monitor`` is worse without it, by the module's own ``validation_step`` on batches kept from validation. Or
            a function of a network that returns a metric, higher for better: the block whose absence costs least of it
            goes. It gets a copy without the block, in eval mode, on rank 0.
        target: What is to be left in the end: ``"macs"`` or ``"params"``, as a share of the whole network; above 1, a
            number (of operations: for one sample). The block with which it is reached goes as a whole. Of several, all
            must be met.
        blocks_per_step: Takes so many blocks out at each step until the target is met; ``schedule`` and ``steps`` are
            not looked at then.
        schedule: ``"cubic"``, ``"linear"`` or ``"one_shot"``; see :class:`Schedule`.
        steps: In how many steps. A step that an earlier block has done already is passed over.
        end_epoch: Instead of ``steps``: the last step is not after the start of this epoch.
        start_epoch: The first step is at the start of this epoch.
        every_n_epochs: Epochs of fine-tuning after each step.
        max_drop: The guard: where ``monitor`` is further than this from the whole network's when the next step is due,
            or at the end, the network goes back to what it was before the last step.
        monitor: Logged metric that the guard watches, and that ``criterion="metric"`` means.
        mode: ``"max"`` or ``"min"``.
        reference: The whole network's metric; by default the last value before the first step.
        on_drop: After going back: ``"stop"``, or go on in ``"smaller"`` steps.
        protect: Names or patterns (``"layer1.*"``) of blocks that stay.
        module: Name of the network within the LightningModule. By default it is the first module with convolutions
            that a step calls to train it.
        example_inputs: What it takes: a tensor, a tuple of arguments or a dict of them; a list of integers is a shape.
            By default they are taken from the first batch.
        samples: Training samples that are kept, in checkpoints too, for the criterion and BatchNorm's statistics; as
            many of validation for ``"metric"``.
        sample_megabytes: How much room each of the two may take.
        distill: Weight of a distillation loss from the whole network, added to the module's own; 0 for none.
        temperature: Of the distillation. A higher one teaches the small probabilities too, for which a short
            fine-tuning has too few steps: there take a small ``distill`` with it, such as 0.1 at 4.
        distill_task: ``"multiclass"``, ``"multilabel"`` or ``"regression"``: what the network's outputs are.
        reset_best: ModelCheckpoint, EarlyStopping and ReduceLROnPlateau forget their best score at each step. Without
            it the best checkpoint is most often the whole network.

    Raises:
        ValueError: For arguments that make no sense.
        MisconfigurationException: Before the first step, where there is no block to take out, a target is met already
            or out of reach, and for a strategy or callback it cannot work with.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> prune = LayerPruningCallback(target={"macs": 0.6}, steps=3, start_epoch=1, max_drop=0.01)
        >>> trainer = Trainer(callbacks=[prune], logger=False, accelerator="cpu")
    """

    nothing_done = "no block taken out"

    def __init__(
        self,
        criterion: str | Callable[[nn.Module], float] = "outputs",
        target: dict[str, float] | None = None,
        blocks_per_step: int | None = None,
        schedule: Shape = "linear",
        steps: int = 3,
        end_epoch: int | None = None,
        start_epoch: int = 0,
        every_n_epochs: int = 1,
        max_drop: float | None = None,
        monitor: str = "val_acc",
        mode: Literal["min", "max"] = "max",
        reference: float | None = None,
        on_drop: Literal["stop", "smaller"] = "stop",
        protect: list[str] | None = None,
        module: str | None = None,
        example_inputs: Any = None,
        samples: int = 256,
        sample_megabytes: float = 64.0,
        distill: float = 0.0,
        temperature: float = 1.0,
        distill_task: Task = "multiclass",
        reset_best: bool = True,
    ) -> None:
        self.blocks_per_step = blocks_per_step
        self.protect: Sequence[str] = tuple(protect or ())
        target = {"macs": 0.66} if target is None else dict(target)
        check_target(target)
        if not callable(criterion) and criterion not in CRITERIA:
            raise ValueError(f"There is no criterion {criterion!r}. {did_you_mean(str(criterion), CRITERIA)}")
        if blocks_per_step is not None and blocks_per_step < 1:
            raise ValueError(f"blocks_per_step={blocks_per_step} must be at least 1.")
        if end_epoch is not None:
            steps = steps_until(end_epoch, start_epoch, every_n_epochs)
        super().__init__(
            Schedule(schedule, steps, start_epoch, every_n_epochs),
            target,
            criterion,
            monitor=monitor,
            mode=mode,
            max_drop=max_drop,
            reference=reference,
            on_drop=on_drop,
            module=module,
            example_inputs=example_inputs,
            samples=samples,
            sample_megabytes=sample_megabytes,
            distill=distill,
            temperature=temperature,
            distill_task=distill_task,
            reset_best=reset_best,
        )

    def _at_a_time(self) -> str | None:
        return None if self.blocks_per_step is None else f"{self.blocks_per_step} blocks at a time"

    @property
    def state_key(self) -> str:
        """Tells two apart in a checkpoint, by what they prune."""
        return f"{type(self).__qualname__}{ {'module': self.module, 'target': self.target} }"

    @property
    def removed(self) -> list[str]:
        """Names of the blocks that are out of the network, in the order of removal."""
        return list(self._removed)

    # ---- state

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self._removed: list[str] = []
        self._before_load: set[int] = set()
        self._held: list[tuple[str, set[str]]] = []  # kind of each optimizer, and names of what it holds

    def _progress(self) -> dict[str, Any]:
        return super()._progress() | {"removed": list(self._removed), "left_out": dict(self._left_out)}

    def _take_up(self, progress: Mapping[str, Any]) -> None:
        super()._take_up(progress)
        self._removed = list(progress["removed"])
        self._left_out = dict(progress["left_out"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Notes the parameters that are there before a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        if belongs_to(trainer, self):
            self._before_load = {id(parameter) for parameter in pl_module.parameters()}
            if stage == "fit":
                self.on_release(configure_with_blocks(pl_module))

    def conflict_with(self, other: object) -> str | None:
        """Whoever knows parameters by their names."""
        if isinstance(other, BaseFinetuning):
            return "it looks for all parameters by their names when it resumes, and those of removed blocks are gone."
        if isinstance(other, TipCallback) and (reason := other.keeps_names()):
            return f"{reason}, and blocks go. Run one after the other: the second one goes on from load_pruned."
        return super().conflict_with(other)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the parameters of blocks that a checkpoint has removed out of optimizers that were made before it.

        LightningCLI makes its optimizer before the checkpoint is loaded; the checkpoint's optimizer has none of these.
        """
        super().on_fit_start(trainer, pl_module)
        gone = self._before_load - {id(parameter) for parameter in pl_module.parameters()}
        for optimizer in trainer.optimizers:
            keep_parameters(optimizer, lambda parameter: id(parameter) not in gone)

    # ---- what is taken out

    def _holders(self, module: nn.Module) -> list[str]:
        return networks_in(module, (_ConvNd, nn.Linear))

    def _try_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network, _ = self._target(pl_module)
        names = {id(p): name.replace(f"{COMPILED}.", "") for name, p in network.named_parameters()}
        self._held = [
            (type(o).__name__, {names.get(id(p), "") for group in o.param_groups for p in group["params"]})
            for o in trainer.optimizers
        ]
        with self._ranking(trainer, pl_module):
            super()._try_out(trainer, pl_module)

    def _step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batches: list[Inputs]) -> None:
        with self._ranking(trainer, pl_module):
            super()._step(trainer, pl_module, batches)

    def _measure(self, network: nn.Module, example: Inputs) -> dict[str, float]:
        return _as_numbers(count_cost(network, example))

    def _check(self, network: nn.Module, example: Inputs) -> None:
        if self._evaluation is not None:
            with untouched(network):
                self._evaluation()(network)
        removable = [block.name for block in find_blocks(network, example, protect=self.protect) if block.removable]
        for kind, names in self._held:
            if all(any(name.startswith(f"{block}.") for block in removable) for name in names):
                inside = [block for block in removable if any(name.startswith(f"{block}.") for name in names)]
                raise ValueError(
                    f"One {kind} holds parameters of blocks only that may be taken out ({', '.join(inside)}), and an"
                    f" optimizer needs some. Give it others as well, or protect={inside[:1]!r}."
                )
        # Whether the target can be reached does not depend on the criterion.
        plan_blocks(
            network,
            example,
            target=self._goals(self._shares()),
            criterion="branch_norm",
            batches=[example],
            recalibrate=False,
            protect=self.protect,
            score_forward=call_network,
        )

    def _goals(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Shares of the whole network in numbers."""
        return {name: share * self._reference[name] for name, share in shares.items()}

    def _propose(self, network: nn.Module, example: Inputs, position: float) -> dict[str, Any] | None:
        shares, now = self._shares(), _as_numbers(count_cost(network, example))
        done = position >= 1.0
        if self.blocks_per_step is None:
            shares = {name: self.schedule.goal(share, position) for name, share in shares.items()}
        goals = self._goals(shares)
        if all(now[name] <= goal * (1 + 1e-9) for name, goal in goals.items()):
            return None
        if self._by_metric and self._evaluation is None:
            raise ValueError("criterion='metric' looks at validation batches, and nothing was validated yet.")
        own = self._evaluation() if self._evaluation is not None else self.criterion
        report = plan_blocks(
            network,
            example,
            count=None if self.blocks_per_step is None else max(1, round(self.blocks_per_step * self._scale)),
            target=goals,
            criterion=self.criterion if isinstance(self.criterion, str) else "metric",
            evaluate=None if isinstance(own, str) else own,
            mode=self.mode if self._by_metric else "max",
            batches=self._batches or [example],
            protect=self.protect,
            score_forward=call_network,
        )
        cost = _as_numbers(report.after)
        if self.blocks_per_step is not None:
            done = all(cost[name] <= goal * (1 + 1e-9) for name, goal in goals.items())
        number = len(report.removed)
        names = ", ".join(report.removed)
        return {
            "blocks": dict(report.removed),
            "left_out": dict(report.left_out),
            "cost": cost,
            "what": f"{number} {'block' if number == 1 else 'blocks'} taken out: {names}",
            "details": {name: value / self._reference[name] for name, value in cost.items()},
            "done": done,
        }

    def _commit(self, network: nn.Module, proposal: Mapping[str, Any], optimizers: list[Optimizer]) -> None:
        real = {name.replace(f"{COMPILED}.", ""): name for name, _ in network.named_modules()}
        take_out(network, {real[name]: activation for name, activation in proposal["blocks"].items()}, optimizers)
        self._removed += proposal["blocks"]
        self._left_out = dict(proposal["left_out"])

    # ---- the report

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves what was taken out, and what the network costs before and after, as table and file."""
        if self._removed and leaves_files(trainer):
            self._write_report(trainer)
        super().on_fit_end(trainer, pl_module)

    def _write_report(self, trainer: pl.Trainer) -> None:
        whole, left = self._by_sample(self._reference), self._by_sample(self._cost)
        rows = cost_rows(whole, left)
        title = f"Without {', '.join(self._removed)}"
        say(trainer, f"{title}\n{render_table(('', 'before', 'after', 'left'), rows)}")
        report = {
            "removed": list(self._removed),
            "left_out": dict(self._left_out),
            "before": whole,
            "after": left,
            "events": [event.to_dict() for event in self.events],
        }
        (report_folder(trainer) / "blocks.json").write_text(json.dumps(report, indent=2) + "\n")


def _as_numbers(cost: Cost) -> dict[str, float]:
    return {name: float(getattr(cost, attribute)) for name, attribute in TARGETS.items()}
