"""`FilterPruningCallback`: rank the filters, take the least important out, fine-tune, repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tips.core import leaves_files, say
from lightning_tips.pruning.fit import checks
from lightning_tips.pruning.fit.distillation import Task
from lightning_tips.pruning.fit.filter_steps import FilterSteps
from lightning_tips.pruning.fit.report import write_report
from lightning_tips.pruning.fit.schedule import Schedule, Shape, steps_until
from lightning_tips.pruning.ranking.data_criteria import GradientScores


class FilterPruningCallback(FilterSteps):
    """Makes a network smaller and faster while it trains: its least important filters are taken out, in steps.

    Works with any network in any LightningModule. At the start of an epoch filters are ranked (Li et al. 2017, arXiv
    1608.08710), the change is tried on a copy, and then weights, gradients and optimizer state are cut in place;
    BatchNorm's statistics are estimated anew, DDP is made anew, and the epochs that follow fine-tune.

    Args:
        criterion: What makes a filter important: ``"l1"``, ``"l2"``, ``"geometric_median"``, ``"bn_scale"``,
            ``"random"``; from validation batches ``"mean_activation"`` and ``"apoz"`` (from the kept training inputs
            where no validation has run); from the gradients of training ``"taylor"`` (Molchanov et al. 2019). Or a
            function of (name, layer) that returns (out_channels,).
        target: What is to be left in the end: ``"macs"``, ``"params"``, ``"filters"``, ``"latency"``, as a share of
            the unpruned network; above 1, a number (of operations: for one sample). Latency is measured, on the
            device. Of several, all must be met.
        filters_per_step: Takes so many filters out at each step, over all layers (the m of Li et al.), or such a share
            of all, until the target is met; ``schedule`` and ``steps`` are not looked at then.
        schedule: ``"cubic"``, ``"linear"`` or ``"one_shot"``; see :class:`Schedule`.
        steps: In how many steps.
        end_epoch: Instead of ``steps``: the last step is not after the start of this epoch.
        start_epoch: The first step is at the start of this epoch.
        every_n_epochs: Epochs of fine-tuning after each step.
        max_drop: The guard: where ``monitor`` is further than this from the unpruned network's when the next step is
            due, or at the end, the network goes back to what it was before the last step. It waits for a validation
            before the first step.
        monitor: Logged metric that the guard watches.
        mode: ``"max"`` or ``"min"``.
        reference: The unpruned network's metric; by default the last value before the first step.
        on_drop: After going back: ``"stop"``, or go on in ``"smaller"`` steps.
        round_to: Channels are left in multiples of this, where that takes no more than the target asks for.
        scope: Of the ranking, see ``plan_filters``: ``"isomorphic"``, ``"global"``, ``"global_raw"`` or ``"layer"``.
        plan: More arguments of ``plan_filters``: ``inner_only``, ``floor``, ``protect``, ``limits``, ...
        module: Name of the network within the LightningModule. By default it is the first module with convolutions
            that a step calls to train it.
        example_inputs: What it takes: a tensor, a tuple of arguments or a dict of them; a list of integers is a shape.
            By default they are taken from the first batch.
        latency_batch: Batch size for which latency is measured.
        samples: Training samples that are kept, in checkpoints too, to estimate BatchNorm's statistics from.
        sample_megabytes: How much room they may take.
        distill: Weight of a distillation loss from the unpruned network, added to the module's own; 0 for none.
        temperature: Of the distillation. A higher one teaches the small probabilities too, for which a short
            fine-tuning has too few steps: there take a small ``distill`` with it, such as 0.1 at 4.
        distill_task: ``"multiclass"``, ``"multilabel"`` or ``"regression"``: what the network's outputs are.
        reset_best: ModelCheckpoint, EarlyStopping and ReduceLROnPlateau forget their best score at each step. Without
            it the best checkpoint is most often the unpruned network.

    Raises:
        ValueError: For arguments that make no sense.
        MisconfigurationException: Before the first step, where there is nothing to prune, a target is met already or
            out of reach, and for a strategy or callback it cannot work with.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> prune = FilterPruningCallback(target={"macs": 0.5}, steps=4, start_epoch=1, distill=1.0)
        >>> trainer = Trainer(callbacks=[prune], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        criterion: str | Callable[[str, nn.Module], Tensor] = "l1",
        target: dict[str, float] | None = None,
        filters_per_step: int | float | None = None,
        schedule: Shape = "cubic",
        steps: int = 5,
        end_epoch: int | None = None,
        start_epoch: int = 0,
        every_n_epochs: int = 1,
        max_drop: float | None = None,
        monitor: str = "val_acc",
        mode: Literal["min", "max"] = "max",
        reference: float | None = None,
        on_drop: Literal["stop", "smaller"] = "stop",
        round_to: int | None = None,
        scope: Literal["isomorphic", "global", "global_raw", "layer"] = "isomorphic",
        plan: dict[str, Any] | None = None,
        module: str | None = None,
        example_inputs: Any = None,
        latency_batch: int = 32,
        samples: int = 256,
        sample_megabytes: float = 64.0,
        distill: float = 0.0,
        temperature: float = 1.0,
        distill_task: Task = "multiclass",
        reset_best: bool = True,
    ) -> None:
        self.filters_per_step = filters_per_step
        self.round_to = round_to
        self.scope = scope
        self.plan = dict(plan or {})
        self.latency_batch = latency_batch
        checked = checks.check_target({"macs": 0.5} if target is None else target)
        checks.check_filters(filters_per_step)
        checks.check_criterion(criterion)
        checks.check_plan(self.plan)
        if end_epoch is not None:
            steps = steps_until(end_epoch, start_epoch, every_n_epochs)
        self._taylor = GradientScores() if criterion == "taylor" else None
        super().__init__(
            Schedule(schedule, steps, start_epoch, every_n_epochs),
            checked,
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

    @property
    def state_key(self) -> str:
        """Tells two apart in a checkpoint, by the network that they prune."""
        return f"{type(self).__qualname__}{ {'module': self.module} }"

    # ---- state

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self._channels: dict[str, list[int]] = {}  # by layer, before the first step and now
        self._elsewhere: list[str] = []  # layers that the training step may use outside of the network's call
        if self._taylor is not None:
            self._taylor.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return super().state_dict() | {
            "left_out": dict(self._left_out),
            "elsewhere": list(self._elsewhere),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`."""
        super().restore(state)
        self._left_out = dict(state["left_out"])
        self._elsewhere = list(state["elsewhere"])

    def _progress(self) -> dict[str, Any]:
        return super()._progress() | {
            "channels": {name: list(pair) for name, pair in self._channels.items()},
            "taylor": self._taylor.state_dict() if self._taylor is not None else None,  # in the network's shapes
        }

    def _take_up(self, progress: Mapping[str, Any]) -> None:
        super()._take_up(progress)
        self._channels = {name: list(pair) for name, pair in progress["channels"].items()}
        if self._taylor is not None and progress["taylor"] is not None:
            self._taylor.load_state_dict(progress["taylor"])

    # ---- data for the criterion

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a criterion that looks at data before there is any."""
        super().prepare(trainer, pl_module)
        needs = self._looks_at_activations or self._taylor is not None
        if needs and self.schedule.start_epoch == 0 and not self._waits_for_validation:
            raise MisconfigurationException(
                f"{type(self).__name__}: {self.criterion!r} looks at data of training or validation, and there is none"
                " before the first epoch. Set start_epoch to 1 or more."
            )

    # ---- the report

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the channels of each layer, before and after, as table, file and picture."""
        if self._channels and leaves_files(trainer):
            if not self._finished:
                say(trainer, f"The target of {type(self).__name__} is not reached; the run ended before its next step.")
            whole, left = self._by_sample(self._reference), self._by_sample(self._cost)
            write_report(trainer, self._channels, self._left_out, whole, left, self.events)
        super().on_fit_end(trainer, pl_module)
