"""Members that run inside one Trainer: their hooks, their logs, their random numbers, their optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_tips.core import ActsOn, TipCallback, require_strategy
from lightning_tips.core.lightning_private_members import (
    MemberRun,
    count_step,
    is_accumulating,
    log_levels,
    run_members,
)
from lightning_tips.ensemble.members import RandomStream, member_seed

__all__ = ["Together"]

_TRANSFER_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")


class Together:
    """The members of an ensemble while a Trainer runs it.

    Args:
        trainer: From ``setup`` on.
        parent: The ensemble.
        members: Its members.
        callbacks: For each member a copy; one with a ``seed`` gets that plus the member's number.
        seed: Of the members' random numbers, see :func:`member_seed`.
        stage: What the Trainer does: ``"fit"``, ``"validate"``, ``"test"``, ``"predict"``.
        bring: Puts a member on the device, if it is not there.

    Raises:
        MisconfigurationException: Before the first step, for what cannot work.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        parent: pl.LightningModule,
        members: Sequence[pl.LightningModule],
        callbacks: Sequence[pl.Callback],
        seed: int | None,
        stage: str,
        bring: Callable[[int], None],
    ) -> None:
        self._bring = bring
        self.trainer, self.parent, self.members = trainer, parent, list(members)
        self.outputs: list[Any] = [None] * len(self.members)
        self.split = False  # whether a training batch is a dict of the members' own ones
        self._parts: list[Any] | None = None
        if stage == "fit":
            self._check(parent)
        self.streams = [RandomStream(member_seed(seed, i)) for i in range(len(self.members))]
        own = [self._callbacks_of(i, callbacks) for i in range(len(self.members))]
        self.runs = [MemberRun(trainer, m, prefix(i), own[i]) for i, m in enumerate(self.members)]
        for index, member in enumerate(self.members):
            vars(member)["log"] = _PrefixedLog(parent, member, index)
        self._transfers = [[hook for hook in _TRANSFER_HOOKS if self._transfers_itself(m, hook)] for m in self.members]
        self._take_back = run_members(trainer, self.runs) if stage == "fit" else lambda: None

    def close(self) -> None:
        """Leaves the members and the Trainer as they were."""
        self._take_back()
        for member in self.members:
            vars(member).pop("log", None)
            member._trainer = None
            member._current_fx_name = None
            member._metric_attributes = None

    # ---- checks

    def _check(self, parent: pl.LightningModule) -> None:
        require_strategy(self.trainer, parent, SingleDeviceStrategy, DDPStrategy)
        if "configure_optimizers" in vars(parent):
            raise MisconfigurationException(
                "The members of an ensemble have optimizers of their own, but an optimizer is given for the whole (in a"
                " yaml: `optimizer` at the top). Give it to the members, or let their configure_optimizers say it."
            )
        for index, member in enumerate(self.members):
            for needed in ("training_step", "configure_optimizers"):
                if not is_overridden(needed, member):
                    raise MisconfigurationException(f"member {index} ({type(member).__name__}) has no {needed}.")
            clips = bool(self.trainer.gradient_clip_val)
            if not member.automatic_optimization and (clips or self.trainer.accumulate_grad_batches != 1):
                raise MisconfigurationException(
                    f"member {index} ({type(member).__name__}) optimizes manually, so Lightning can neither clip nor"
                    " accumulate its gradients: leave gradient_clip_val and accumulate_grad_batches of the Trainer"
                    " alone, and do it in its training_step."
                )

    def _callbacks_of(self, index: int, shared: Sequence[pl.Callback]) -> list[pl.Callback]:
        self.members[index]._trainer = self.trainer  # until its own one is made
        brought = self.members[index].configure_callbacks()
        callbacks = [*(brought if isinstance(brought, Sequence) else [brought]), *map(copy.deepcopy, shared)]
        for callback in callbacks:
            if isinstance(callback, TipCallback) and callback.acts_on < ActsOn.LOSS:
                raise MisconfigurationException(
                    f"{type(callback).__name__} changes the network or the optimizer, which a member inside an ensemble"
                    " cannot have changed: train the members apart, and join them with"
                    " EnsembleModule.from_checkpoints."
                )
            if isinstance(callback, WeightAveraging):
                raise MisconfigurationException(
                    f"{type(callback).__name__} validates the averaged weights, to which the vote would be fitted, but"
                    " the ensemble's checkpoints would hold the others: train the members apart, and join them with"
                    " EnsembleModule.from_checkpoints."
                )
        for callback in callbacks[len(callbacks) - len(shared) :]:
            if isinstance(getattr(callback, "seed", None), int):
                callback.seed += index  # type: ignore[attr-defined]
        return callbacks

    def _transfers_itself(self, member: pl.LightningModule, hook: str) -> bool:
        """Whether Lightning would call the member's hook if it ran alone: a DataModule's own one comes first."""
        datamodule = getattr(self.trainer, "datamodule", None)
        return is_overridden(hook, member) and (datamodule is None or not is_overridden(hook, datamodule))

    # ---- one member after the other

    @contextmanager
    def acting(self, index: int) -> Iterator[MemberRun]:
        """While it is open, random numbers are those of this member."""
        with self.streams[index].active(self.parent.device):
            yield self.runs[index]

    def _bring_for(self, hook: str, index: int) -> None:
        """Members that rest on the CPU come to the device for a hook of their own."""
        if is_overridden(hook, self.members[index]):
            self._bring(index)

    def each(self, hook: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Calls a hook of every member and of its callbacks."""
        results = []
        for index in range(len(self.runs)):
            self._bring_for(hook, index)
            with self.acting(index) as run:
                results.append(run.call(hook, *args, **kwargs))
        return results

    def start_batch(self, hook: str, batch: Any, *args: Any) -> None:
        """``on_*_batch_start`` of every member, each with its own batch."""
        training = hook == "on_train_batch_start"
        self._parts = [self._part(batch, index, training) for index in range(len(self.runs))]
        for index, part in enumerate(self._parts):
            self._bring_for(hook, index)
            with self.acting(index) as run:
                if run.call(hook, part, *args) == -1:
                    raise MisconfigurationException(
                        f"member {index} returns -1 from {hook} to end the epoch, but the others go on: shorten the"
                        " epoch with limit_train_batches for all of them."
                    )

    def end_batch(self, hook: str, batch: Any, *args: Any) -> None:
        """``on_*_batch_end`` of every member, each with its own outputs and batch."""
        for index in range(len(self.runs)):
            self._bring_for(hook, index)
            with self.acting(index) as run:
                run.call(hook, self.outputs[index], self.part(batch, index), *args)
        self._parts, self.outputs = None, [None] * len(self.runs)

    def part(self, batch: Any, index: int) -> Any:
        """A member's share of the batch, after its own hooks for it."""
        if self._parts is None:
            return self._part(batch, index, self.trainer.training)
        return self._parts[index]

    def _part(self, batch: Any, index: int, training: bool) -> Any:
        part = batch[f"member_{index}"] if training and self.split else batch
        if self._transfers[index]:
            with self.acting(index):
                for hook in self._transfers[index]:
                    part = getattr(self.members[index], hook)(part, 0)
        return part

    # ---- training

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
        """Those of all members, so that Lightning keeps their state in checkpoints."""
        optimizers: list[torch.optim.Optimizer] = []
        schedulers: list[dict[str, Any]] = []
        for index in range(len(self.runs)):
            with self.acting(index) as run:
                own, configs = run.configure_optimizers()
            optimizers += own
            for number, config in enumerate(configs):
                name = config.name or "lr" + (f"-{number}" if number else "")
                schedulers.append(
                    {"scheduler": config.scheduler, "interval": config.interval, "name": prefix(index) + name}
                )
        return optimizers, schedulers

    def train(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """One step of every member that has not stopped; counts as one step of the Trainer."""
        # Each member enters the precision's autocast by itself; its backward and its optimizer stay outside, as alone.
        with torch.autocast(self.parent.device.type, enabled=False):
            for index, run in enumerate(self.runs):
                if not run.trainer.should_stop:
                    with self.acting(index):
                        self.outputs[index] = run.train(self.part(batch, index), batch_idx)
        if not is_accumulating(self.trainer):
            count_step(self.trainer)
        if all(run.trainer.should_stop for run in self.runs):
            self.trainer.should_stop = True
        losses = [output["loss"] for output in self.outputs if output and "loss" in output]
        result: dict[str, Any] = {"members": self.outputs}
        if losses:
            result["loss"] = torch.stack([loss.detach().float() for loss in losses]).mean()
        return result

    def state_dict(self) -> list[dict[str, Any]]:
        """Plain data of each member."""
        return [run.state_dict() | {"random": s.state_dict()} for run, s in zip(self.runs, self.streams, strict=True)]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restores :meth:`state_dict`."""
        if len(states) != len(self.runs):
            raise MisconfigurationException(
                f"The checkpoint is of an ensemble of {len(states)} members, and this one has {len(self.runs)}."
            )
        for run, stream, state in zip(self.runs, self.streams, states, strict=True):
            run.load_state_dict(state)
            stream.load_state_dict(state["random"])


def prefix(index: int) -> str:
    """What the names of a member's metrics begin with."""
    return f"member_{index}/"


class _PrefixedLog:
    """Stands in the place of a member's ``log``: logs in the name of the ensemble."""

    def __init__(self, parent: pl.LightningModule, member: pl.LightningModule, index: int) -> None:
        self._parent, self._member, self._index = parent, member, index

    def __call__(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        metric_attribute: str | None = None,
        **options: Any,
    ) -> None:
        on_step, on_epoch = log_levels(self._member, on_step, on_epoch)
        if metric_attribute is not None:
            metric_attribute = f"members.{self._index}.{metric_attribute}"
        # Not in the progress bar, where the members' numbers would leave no room for the ensemble's.
        self._parent.log(
            prefix(self._index) + name,
            value,
            False,
            logger,
            on_step,
            on_epoch,
            reduce_fx,
            metric_attribute=metric_attribute,
            **options,
        )
