"""What a run shows before and while it prunes: metrics, inputs of the network, how sensitive its layers are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_tips.core import log_picture, say
from lightning_tips.pruning.fit.base import PruningCallback
from lightning_tips.pruning.fit.capture import Capture, Sample, call_network, find_network
from lightning_tips.pruning.fit.filter_callback import FilterPruningCallback
from lightning_tips.pruning.networks.copies import plain_copy
from lightning_tips.pruning.ranking.sensitivity import SensitivityTable, sensitivity

DATA_FREE = "l1"
"""Ranks in the sensitivity analysis where the criterion needs gradients of training."""


def numbers_of(trainer: pl.Trainer) -> dict[str, float]:
    """What was logged, where it is one number."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}


class Watch(pl.Callback):
    """Notes what validation says, and what the network is called with there.

    Args:
        tip: The callback that prunes.

    Attributes:
        rows: ``epoch``, ``step`` and metrics of each validation in fit.
        name: Of the network; ``None`` until it was called.
        sample: Inputs of it, from validations before fit.
    """

    def __init__(self, tip: PruningCallback) -> None:
        self.rows: list[dict[str, float]] = []
        self.name: str | None = tip.module
        self.sample = Sample(256, 64.0)
        self._capture: Capture | None = None

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Looks what the network is called with."""
        if trainer.state.fn == TrainerFn.VALIDATING and not self.sample.full:
            self._capture = Capture(pl_module, self.name)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps it."""
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.remove()
            self.name = capture.name if self.name is None else self.name
            self.sample.note(trainer, capture.inputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes together what the ranks have seen."""
        if trainer.state.fn == TrainerFn.VALIDATING and not self.sample.full:
            self.sample.add_noted(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the module without hooks."""
        if self._capture is not None:
            self._capture.remove()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the metrics."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.rows.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **numbers_of(trainer)})


def limit_by_sensitivity(
    trainer: pl.Trainer,
    tip: PruningCallback,
    original: nn.Module,
    watch: Watch,
    datamodule: Any,
    drop: float,
    folder: Path,
) -> SensitivityTable:
    """Tries every layer alone, on validation data, and gives the callback the limits that follow.

    Args:
        trainer: Whose devices, precision and ``limit_val_batches`` are used.
        tip: A FilterPruningCallback. Its ``plan["limits"]`` are set; those that it has stay.
        original: A copy of the module; stays as it is.
        watch: Has seen a validation of it.
        datamodule: Its data, or ``None``.
        drop: How much of the callback's ``monitor`` a layer alone may cost.
        folder: For ``sensitivity.json`` and ``sensitivity.png``.

    Raises:
        MisconfigurationException: If validation did not call the network, or does not log ``monitor``.
    """
    assert isinstance(tip, FilterPruningCallback)
    if not watch.sample.batches or watch.name is None:
        raise MisconfigurationException(
            "The sensitivity analysis did not find what the network is called with in validation. Pass --module, the"
            " name of the network."
        )
    name, batches = watch.name, watch.sample.batches
    quiet = pl.Trainer(
        accelerator=trainer.accelerator,
        devices=1,
        precision=trainer.precision,
        limit_val_batches=trainer.limit_val_batches,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    holder = plain_copy(original)

    def evaluate(network: nn.Module) -> float:
        module = network if not name else _with(holder, name, network)
        assert isinstance(module, pl.LightningModule)
        quiet.validate(module, datamodule=datamodule, verbose=False)
        value = numbers_of(quiet).get(tip.monitor)
        if value is None:
            raise MisconfigurationException(
                f"The sensitivity analysis needs the monitor {tip.monitor!r}, and validation logs"
                f" {', '.join(numbers_of(quiet)) or 'nothing'}. Pass --monitor, and --mode where less is better."
            )
        return value

    criterion = DATA_FREE if tip.criterion == "taylor" else tip.criterion
    say(trainer, "Sensitivity: taking channels from one layer after the other ...")
    table = sensitivity(
        find_network(original, name),
        batches[0],
        evaluate,
        shares=(0.25, 0.5, 0.75),
        criterion=criterion,
        batches=batches,
        forward=call_network,
        mode=tip.mode,
    )
    # The user's own come last and hold.
    own = dict(tip.plan.get("limits") or {})
    tip.plan["limits"] = {**table.limits(drop), **own}
    (folder / "sensitivity.json").write_text(
        json.dumps(table.to_dict() | {"max_drop": drop, "limits": table.limits(drop)}, indent=2) + "\n"
    )
    table.plot(folder / "sensitivity.png")
    log_picture(trainer, "tips/sensitivity", folder / "sensitivity.png")
    say(trainer, f"Sensitivity: {folder / 'sensitivity.png'}; shares that may go: {_shown(table.limits(drop))}")
    return table


def _with(holder: nn.Module, name: str, network: nn.Module) -> nn.Module:
    parent, _, last = name.rpartition(".")
    setattr(holder.get_submodule(parent), last, network)
    return holder


def _shown(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in limits.items())
