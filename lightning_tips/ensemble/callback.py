"""The callback that an EnsembleModule brings: its place among the tips, its events, its pictures."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn

from lightning_tips.core import (
    ActsOn,
    LogitWatcher,
    TipCallback,
    find_tips,
    leaves_files,
    log_picture,
    report_folder,
)
from lightning_tips.ensemble.data import MemberSampler
from lightning_tips.ensemble.plots import plot_weights

if TYPE_CHECKING:
    from lightning_tips.ensemble.module import EnsembleModule


class EnsembleCallback(TipCallback):
    """Made by :class:`EnsembleModule`, one for each; there is no need to make one.

    Args:
        ensemble: Whose it is.
    """

    tip = "ensemble"
    acts_on = ActsOn.NETWORK

    def __init__(self, ensemble: EnsembleModule) -> None:
        self.brought_by = self._ensemble = ensemble

    def describe(self) -> str:
        """For the table at fit start."""
        ensemble = self._ensemble
        kinds = ", ".join(dict.fromkeys(type(m).__name__ for m in ensemble.members))
        weights = ensemble.weights if isinstance(ensemble.weights, str) else "given"
        how = f"{ensemble.voting} vote" + (f", weights {weights}" if ensemble.voting != "soft" else "")
        data = "" if ensemble.member_data == "shared" else f", data: {ensemble.member_data}"
        return f"{len(ensemble.members)} members together ({kinds}), {how}{data}"

    def parts(self) -> list[tuple[str, TipCallback]]:
        """The members' tips; one row where it does and did the same in each."""
        of_members = [find_tips(trainer) for trainer in self._ensemble.member_trainers()]
        rows: list[tuple[str, TipCallback]] = []
        for same in zip_longest(*of_members):
            present = [(index, tip) for index, tip in enumerate(same) if tip is not None]
            kinds = {(type(t), t.describe(), t.outlook(), str([e.to_dict() for e in t.events])) for _, t in present}
            if len(kinds) == 1 and len(present) == len(of_members):
                rows.append((f"each: {type(present[0][1]).__name__}", present[0][1]))
            else:
                rows += [(f"{index}: {type(tip).__name__}", tip) for index, tip in present]
        return rows

    def conflict_with(self, other: object) -> str | None:
        """A tip for the Trainer's one network or optimizer finds those of all members."""
        if isinstance(other, LogitWatcher) and not other.tolerant:
            return (
                "it looks at what self(...) returns in validation, where an ensemble calls its members instead. Leave"
                " it out: the ensemble logs what its vote is worth."
            )
        if isinstance(other, WeightAveraging):
            return (
                "it would average the weights and the temperature of the vote over time, which are fitted anew in each"
                " validation and belong to the members of that moment. Train the members apart with it"
                " (lightning-tips ensemble), and join them with EnsembleModule.from_checkpoints."
            )
        if isinstance(other, TipCallback) and other is not self and other.acts_on < ActsOn.LOSS:
            return (
                "it changes one network or its optimizer, and an ensemble has several. Train the members apart with it"
                " (lightning-tips ensemble), and join them with EnsembleModule.from_checkpoints."
            )
        if isinstance(other, TipCallback) and other is not self and self._ensemble.member_data != "shared":
            return (
                f"with member_data={self._ensemble.member_data!r} each member has batches of its own. Give the tip to"
                " the members (member_callbacks), or leave member_data at 'shared'."
            )
        return None

    def start_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the epoch that it is: Lightning's own count leaves one out on some resumes."""
        loaders = trainer.train_dataloader
        for loader in loaders.values() if isinstance(loaders, dict) else ():
            if isinstance(sampler := getattr(loader, "sampler", None), MemberSampler):
                sampler.set_epoch(trainer.current_epoch)

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks what can be known before training."""
        self._ensemble.check_before_training()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Records what trains."""
        super().on_train_start(trainer, pl_module)
        if not self.events:
            self.record(trainer, f"{len(self._ensemble.members)} members train together")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Records the weights of the last validation."""
        super().on_train_end(trainer, pl_module)
        ensemble = self._ensemble
        if not ensemble.is_fitted:
            if ensemble.voting != "soft" and ensemble.weights != "uniform":
                same = "all members of the ensemble weigh the same and " if isinstance(ensemble.weights, str) else ""
                rank_zero_warn(
                    f"There was no validation on two samples or more, so {same}there is no temperature. Give the run"
                    " validation data, or call fit_weights(dataloader) afterwards."
                )
            return
        weights = ensemble.vote_weights.tolist()
        details: dict[str, Any] = {f"weight_{i}": weight for i, weight in enumerate(weights)}
        if ensemble.task != "regression":
            details["temperature"] = float(ensemble.vote_temperature)
        self.record(trainer, "weights of the vote", **details)
        if leaves_files(trainer):
            path = report_folder(trainer) / "ensemble_weights.png"
            names = [f"{i} {type(member).__name__}" for i, member in enumerate(ensemble.members)]
            plot_weights(weights, path, names, ensemble.member_scores, "validation accuracy")
            log_picture(trainer, "tips/ensemble/weights", path)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves members and Trainer as they were."""
        super().on_exception(trainer, pl_module, exception)
        self._ensemble.leave_trainer()
