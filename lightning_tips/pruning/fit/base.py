"""What pruning by filters and by blocks share: when to prune, how to change a network in mid-fit, how to go back."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tips.core import ActsOn, accept_other_shapes, log_numbers, on_rank_zero, wrap_again
from lightning_tips.core.tip import belongs_to
from lightning_tips.pruning.fit import checks
from lightning_tips.pruning.fit.capture import Capture, Inputs, Sample, batch_size, find_network
from lightning_tips.pruning.fit.distillation import TaughtTip
from lightning_tips.pruning.fit.guard import take_snapshot
from lightning_tips.pruning.fit.schedule import Schedule
from lightning_tips.pruning.fit.surroundings import best_so_far, reestimate, reset_best, watched_by
from lightning_tips.pruning.networks.copies import log_nothing, plain_copy

TOGETHER = (
    "Pruning tries the network out: name a part whose forward pass does not communicate, with module=..., or prune on"
    " one device."
)


class PruningCallback(TaughtTip):
    """The base of tips that take something out of a network, step by step, and fine-tune after each step.

    Subclasses say what is taken out: :meth:`_measure`, :meth:`_check`, :meth:`_propose` and :meth:`_commit`.

    Args:
        schedule: When, and how much at a time.
        target: What is to be left in the end: by name, a share of the unpruned network or, above 1, a number.
        criterion: By what it is ranked what goes: a name, or a function.
        **arguments: See :class:`TaughtTip` and those that it is made of.
    """

    tip = "pruning"
    acts_on = ActsOn.NETWORK

    nothing_done = "nothing pruned"
    """For the table at fit end."""

    def __init__(self, schedule: Schedule, target: dict[str, float], criterion: Any, **arguments: Any) -> None:
        checks.check_arguments(**arguments)
        super().__init__(**arguments)
        self.schedule = schedule
        self.target = target
        self.criterion = criterion
        self._validation = Sample(arguments["samples"], arguments["sample_megabytes"])
        self._accepts: RemovableHandle | None = None
        self.reset()

    # ---- what a subclass says

    @abstractmethod
    def _measure(self, network: nn.Module, example: Inputs) -> dict[str, float]:
        """What the network costs; on rank 0."""

    @abstractmethod
    def _check(self, network: nn.Module, example: Inputs) -> None:
        """Tries out, on rank 0 and on a copy, what the run will do; raises ValueError where it cannot."""

    @abstractmethod
    def _propose(self, network: nn.Module, example: Inputs, position: float) -> dict[str, Any] | None:
        """What to take out now, as plain data; on rank 0 and on a copy.

        Args:
            network: A copy.
            example: Its inputs.
            position: Share of the schedule's steps that will then be taken.

        Returns:
            What :meth:`_commit` takes, with ``"what"`` and ``"details"`` for the event, ``"cost"`` for the network
            after it, and ``"done"`` where the target is reached; ``None`` when there is nothing to do at this step.
        """

    @abstractmethod
    def _commit(self, network: nn.Module, proposal: Mapping[str, Any], optimizers: list[Optimizer]) -> None:
        """Does it, on every rank, in place."""

    def _at_a_time(self) -> str | None:
        """How much each step takes out, in words, where it is not the schedule that says so."""
        return None

    # ---- what it will do

    def describe(self) -> str:
        """For the table at fit start."""
        goal = ", ".join(f"{name} to {value:g}" for name, value in self.target.items())
        name = self.criterion if isinstance(self.criterion, str) else getattr(self.criterion, "__name__", "own")
        how = self._at_a_time() or f"{self.schedule.shape}, {round(1 / self.schedule.stride)} steps"
        when = f"from epoch {self.schedule.start_epoch} every {self.schedule.every_n_epochs}"
        guard = f", at most {self._guard.max_drop:g} of {self.monitor} lost" if self._guard is not None else ""
        return f"{goal} by {name}, {how}, {when}{guard}" + (f", distilled ({self.distill:g})" if self.distill else "")

    def outlook(self) -> str:
        """For the table at fit end, when nothing was taken out."""
        if self._guard is not None and not self._guard.is_finite:
            return f"{self.nothing_done}: no value of {self.monitor} to judge by"
        if self._finished:
            return f"{self.nothing_done}: what others took out has met the target"
        return f"{self.nothing_done}: the run ended before epoch {self._next_epoch}"

    def _by_sample(self, cost: Mapping[str, float]) -> dict[str, float]:
        """A cost with the operations of one sample, as people give and read them; they are counted on the example."""
        samples = max(1, batch_size(self._example))
        return {name: value / samples if name == "macs" else value for name, value in cost.items()}

    def _shares(self) -> dict[str, float]:
        """The target, as shares of the unpruned network's cost."""
        whole = self._by_sample(self._reference)
        shares = {k: v if v < 1 else v / whole[k] for k, v in self.target.items()}
        for name, share in shares.items():
            if share >= 1:
                raise ValueError(
                    f"The target is met already: {name} is {whole[name]:g}, and {self.target[name]:g} were asked for."
                )
        return shares

    # ---- state

    @property
    def finished(self) -> bool:
        """Whether no more steps will be made."""
        return self._finished

    @property
    def left_out(self) -> dict[str, str]:
        """What could not be taken out at the last step, and why."""
        return dict(self._left_out)

    @property
    def reached(self) -> bool:
        """Whether the network as it is now meets the target. A guard may have ended the steps before that."""
        if not self._cost:
            return False
        shares = self._shares()
        return all(self._cost[name] <= share * self._reference[name] * (1 + 1e-9) for name, share in shares.items())

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self._position = 0.0  # share of the schedule's steps that are taken
        self._next_epoch = self.schedule.start_epoch
        self._finished = False
        self._waiting = False  # for the first batch of the epoch that has begun
        self._checked = False
        self._batches: list[Inputs] = []  # of the step that is being made
        self._reference: dict[str, float] = {}
        self._cost: dict[str, float] = {}
        self._left_out: dict[str, str] = {}
        self._validation.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return super().state_dict() | {
            **self._progress(),
            "finished": self._finished,
            "next_epoch": self._next_epoch,
            "reference": dict(self._reference),
            "validation": self._validation.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`. The network's shapes come with its weights."""
        super().restore(state)
        self._take_up(state)
        self._finished = bool(state["finished"])
        self._next_epoch = int(state["next_epoch"])
        self._reference = dict(state["reference"])
        self._validation.load_state_dict(state["validation"])
        self._checked = bool(self._reference)

    def _progress(self) -> dict[str, Any]:
        """What goes back with the network when it does."""
        return {"position": self._position, "cost": dict(self._cost)}

    def _take_up(self, progress: Mapping[str, Any]) -> None:
        self._position = float(progress["position"])
        self._cost = dict(progress["cost"])

    # ---- before the first step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """In every stage, lets the module load pruned and unpruned checkpoints alike."""
        super().setup(trainer, pl_module, stage)
        if self._accepts is None and belongs_to(trainer, self):
            self._accepts = accept_other_shapes(pl_module)

    def conflict_with(self, other: object) -> str | None:
        """Whoever keeps tensors of the network's first shape."""
        if isinstance(other, PruningCallback) and other is not self and (self._guard or other._guard):
            return (
                "max_drop brings the whole module back, with what the other one has taken out meanwhile. Leave max_drop"
                " out, or run one after the other: the second one goes on from load_pruned."
            )
        return checks.conflict(other)

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks what can be known before anything is built."""
        super().prepare(trainer, pl_module)
        checks.check_run(trainer, self)
        checks.check_step(pl_module, self)
        if self.module is not None:
            find_network(pl_module, self.module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tries everything out on a copy, if the inputs were given; else the first batch shows them."""
        super().on_train_start(trainer, pl_module)
        self._waiting = False
        if self._looks_at_metric and not self._finished:
            self._metric.on_train_start(trainer)
        if not self._finished:
            checks.check_optimizers(trainer, self)
            by_schedule = self._at_a_time() is None
            checks.warn_if_never(trainer, self.schedule if by_schedule else None, self._next_epoch)
            if not self._holders(pl_module):
                raise MisconfigurationException(f"{type(self).__name__}: {checks.why_nothing(pl_module)}")
            self._take_given_example(trainer)
            if self._example is not None:
                self._try_out(trainer, pl_module)
        if self._teacher_state is not None and self.distill:
            self._teach(trainer, pl_module)

    def _try_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises before the first step where pruning could not work."""
        if self._checked:
            return
        self._checked = True
        network, example = self._target(pl_module)
        checks.check_averages(trainer, pl_module, network, self)

        def work() -> dict[str, float]:
            with isolate_rng(), torch.enable_grad():
                copied = _tried_on(network)
                cost = self._measure(copied, example)
                self._reference = self._reference or cost
                self._check(copied, example)
                return cost

        try:
            cost = on_rank_zero(trainer, work, TOGETHER)
        except (ValueError, TypeError) as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        except RuntimeError as error:
            raise MisconfigurationException(
                f"{type(self).__name__}: {self._network or type(pl_module).__name__!r} does not run on its example"
                f" inputs: {error} Give the right example_inputs and module=..."
            ) from error
        self._reference = self._reference or cost
        self._cost = self._cost or dict(cost)

    # ---- what the network is called with

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Looks what the network is called with; makes the step of this epoch if that had to be known first."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._finished:
            return
        waiting, self._waiting = self._waiting, False
        if waiting or not self._checked:
            inputs = self._find(trainer, pl_module, batch)
            self._try_out(trainer, pl_module)
            if waiting:
                batches = Sample(self._sample.samples, self._sample.megabytes)
                batches.add(trainer, inputs)
                self._step(trainer, pl_module, batches.batches)
        if not self._sample.full and not self._finished:
            self._captured()  # left over where the last batch was skipped
            self._capture = Capture(pl_module, self._network if self._network is not None else self._holders(pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps some of it."""
        if not self._sample.full and not self._finished:
            self._sample.add(trainer, self._captured()[1])

    # ---- when

    def start_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes back if the last step cost too much; makes the next one, if it is due."""
        if self._looks_at_metric:
            self._metric.on_train_epoch_start(trainer)
        if self._finished or trainer.current_epoch < self._next_epoch:
            return
        if self._guard is not None:
            known = self._guard.value is not None and (self._guard.reference is not None or self._guard.is_finite)
            if not known and not (self._good is None and self._guard.reference is not None):
                return  # nothing to judge by yet: it waits for a validation
            if self._good is not None and self._guard.fell:
                self._go_back(trainer, pl_module)
        if not self._finished:
            if self._sample.batches and self._checked:
                self._step(trainer, pl_module, self._sample.batches)
            else:
                self._waiting = True

    # ---- a step

    def _step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batches: list[Inputs]) -> None:
        started = time.perf_counter()
        network, example = self._target(pl_module)
        self._batches = batches
        before = self._position
        # Rounded, so that five fifths are the whole.
        position = round(min(1.0, before + self.schedule.stride * self._scale), 9)

        def work() -> dict[str, Any] | None:
            with isolate_rng(), torch.enable_grad():
                return self._propose(_tried_on(network), example, position)

        try:
            proposal = on_rank_zero(trainer, work, TOGETHER)
        except (ValueError, TypeError) as error:
            if not self.events:
                raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
            self._stop(trainer, f"stopped: {error}")
            return
        self._batches = []
        self._next_epoch = trainer.current_epoch + self.schedule.every_n_epochs
        if proposal is None:  # the last step went further than it had to
            self._position = position
            self._finished = position >= 1.0
            return
        if self._guard is not None:
            self._good = take_snapshot(pl_module, trainer.optimizers) | self._progress()
            self._good["best"] = best_so_far(trainer)
            self._guard.begin()
        if self.distill and self._teacher is None:
            self._teach(trainer, pl_module)
        self._commit(network, proposal, trainer.optimizers)
        wrap_again(trainer.strategy, pl_module)
        reestimate(trainer, network, batches)
        self._position = position
        self._cost = dict(proposal["cost"])
        self._finished = bool(proposal["done"])
        if self._finished:
            self._sample.clear()
        self._scores.begin(trainer)
        if self.reset_best and watched_by(trainer):
            reset_best(trainer)
        self.record(trainer, proposal["what"], **proposal["details"])
        # Not in the event: what a resumed run says of it is to be the same.
        log_numbers(trainer, {f"tips/{self.tip}/step_seconds": time.perf_counter() - started})

    def _stop(self, trainer: pl.Trainer, what: str, **details: float) -> None:
        self._finished = True
        self._sample.clear()
        self.record(trainer, what, **details)

    # ---- the end

    def release(self) -> None:
        """Leaves the module without hooks."""
        super().release()
        self._captured()
        self._drop_teacher()
        if self._accepts is not None:
            self._accepts.remove()
            self._accepts = None


def _tried_on(network: nn.Module) -> nn.Module:
    copied = plain_copy(network)
    log_nothing(copied)
    return copied
