"""`ReplayCallback` and its mixin: new data learned without forgetting the old, in any run, from Python or yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset

from lightning_tips.core import TipMixin, did_you_mean, find_labels, log_numbers
from lightning_tips.core.lightning_private import load_validation
from lightning_tips.data.mixed_loader import JoinedDataset, find_dataset
from lightning_tips.data.mixing_tip import MixingTip
from lightning_tips.data.replay import choose_memory, replay_size
from lightning_tips.data.replay_scores import validation_loader, validation_scores

__all__ = ["ReplayCallback", "ReplayMixin"]

Scores = dict[str, float]


class ReplayCallback(MixingTip):
    """Feeds new data to a trained model without losing the old: experience replay, also called rehearsal.

    The run trains on the new data; each batch gets a given share of old samples, drawn anew in each epoch. What the
    module's own validation says of the old and of the new validation set is measured before the first step and after
    the last one, and reported as ``0.912 -> 0.908``.

    The model is trained already: ``fit(ckpt_path=...)``, or weights loaded into the module. For new classes make the
    module with all of them and load the old weights with ``load_with_new_classes`` of ``lightning_tips.transfer``.

    Args:
        old: The old training data; or the name of an attribute or method of the DataModule, or the module, that is or
            returns it. Its samples have the form of the new ones.
        share: Of each batch, how much is old, at least 0 and below 1. With 0 there are the scores alone.
        memory: Keep only so many old samples, equally many of each class; None: all.
        old_validation: The old validation data, given like ``old``; None: it is not scored.
        epoch_size: Samples of an epoch over all ranks; by default so many that each new sample comes once.
        scores: Whether to measure before and after.
        metrics: Names of the metrics to report; by default all that validation logs.
        target_key: Where samples are mappings: the key of the label, for ``memory``.
        seed: Of the order, and of the choice of the memory.

    Raises:
        ValueError: For arguments that make no sense.
        MisconfigurationException: Before the first step: no or empty old data, samples of another form, nothing to
            score.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ReplayCallback("old_dataset", share=0.25)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        old: Dataset | str = "old_dataset",
        share: float = 0.25,
        memory: int | None = None,
        old_validation: Dataset | str | None = "old_val_dataset",
        epoch_size: int | None = None,
        scores: bool = True,
        metrics: list[str] | None = None,
        target_key: str | None = None,
        seed: int = 0,
    ) -> None:
        replay_size(1, share)  # raises
        if memory is not None and memory < 1:
            raise ValueError(f"memory={memory} must be at least 1, or None for all old samples.")
        self.old = old
        self.share = share
        self.memory = memory
        self.old_validation = old_validation
        self.scores = scores
        self.metrics = metrics
        self.target_key = target_key
        super().__init__(epoch_size, seed)
        self.reset()

    def describe(self) -> str:
        """For the table at fit start."""
        if self.sampler is None:
            return f"{self.share:.0%} of each batch old samples"
        old = len(self.sampler.extra)
        return f"{self.share:.0%} of each batch from {old:,} old samples: {self.sampler.epoch_size:,} samples an epoch"

    # ---- state

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self.before: dict[str, Scores] | None = None
        """Scores before the first step, by set (``"old"``, ``"new"``) and metric."""
        self.after: dict[str, Scores] | None = None
        """Scores at the end of the last fit."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint. Where the order is, the loaders know themselves."""
        return super().state_dict() | {"before": self.before}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`."""
        self.before = state["before"]

    # ---- the data

    def mixture(self, trainer: pl.Trainer, loader: DataLoader[Any]) -> Any:
        """New samples, then old ones."""
        name = type(self).__name__
        old = find_dataset(trainer, self.old, name, "old data", "old")
        new: Any = loader.dataset
        if (form := _form(old[0])) != (expected := _form(new[0])):
            raise MisconfigurationException(
                f"{name}: an old sample is {form} and a new one {expected}; they cannot stand in one batch. Let both"
                " datasets return the same."
            )
        self._kept = np.arange(len(old))
        if self.memory is not None and self.memory < len(old):
            try:
                labels = find_labels(old, self.target_key, trainer.is_global_zero)
                self._kept = choose_memory(labels, self.memory, self.seed)
            except (ValueError, TypeError) as error:
                raise MisconfigurationException(f"{name}: memory={self.memory} needs labels. {error}") from error
        self._kept += len(new)
        return JoinedDataset([new, old])

    def mixed(self, loader: DataLoader[Any]) -> None:
        """Lets the old samples be drawn."""
        assert self.sampler is not None
        if self.share:
            self.sampler.set_extra(self._kept, self.share)

    def usual_size(self, drawn: int) -> int:
        """Each new sample once."""
        return replay_size(drawn, self.share)

    # ---- scores

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the model as it came."""
        super().on_train_start(trainer, pl_module)
        if self.scores and self.before is None:
            self.before = self._measure(trainer)
            self._check_metrics(self.before)
            numbers = self._flat(self.before)
            log_numbers(trainer, {f"tips/{self.tip}/before/{name}": value for name, value in numbers.items()})
        if not self.events:
            assert self.sampler is not None
            self.record(
                trainer, "old samples are replayed", share=self.sampler.share, old_samples=len(self.sampler.extra)
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures what became of it."""
        if not self.scores or self.before is None:
            return
        self.after = self._measure(trainer)
        numbers = self._flat(self.after)
        log_numbers(trainer, {f"tips/{self.tip}/after/{name}": value for name, value in numbers.items()})
        before = self._flat(self.before)
        changes = {name: f"{before[name]:.4g} -> {value:.4g}" for name, value in numbers.items() if name in before}
        self.record(trainer, "before -> after", **changes)

    def _measure(self, trainer: pl.Trainer) -> dict[str, Scores]:
        load_validation(trainer)
        loaders = trainer.val_dataloaders
        found = [] if loaders is None else CombinedLoader(loaders).flattened
        if not found:
            raise MisconfigurationException(
                f"{type(self).__name__} scores the old and the new validation data, but no validation runs. Give the"
                " Trainer validation data, or pass scores=False."
            )
        if len(found) > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} scores one validation loader, of the new data, not {len(found)}. Pass the old"
                " data's as old_validation=, or scores=False."
            )
        scores = {"new": validation_scores(trainer, found[0])}
        if self.old_validation is not None:
            name = type(self).__name__
            old = find_dataset(trainer, self.old_validation, name, "old validation data", "old_validation")
            scores = {"old": validation_scores(trainer, validation_loader(trainer, old, found[0]))} | scores
        return scores

    def _check_metrics(self, scores: dict[str, Scores]) -> None:
        known = [name for of_set in scores.values() for name in of_set]
        for name in self.metrics or []:
            if name not in known:
                raise MisconfigurationException(
                    f"{type(self).__name__} is to report {name!r}, which validation does not log."
                    f" {did_you_mean(name, known)}"
                )

    def _flat(self, scores: dict[str, Scores]) -> Scores:
        return {
            f"{of_set} {name}": value
            for of_set, named in scores.items()
            for name, value in named.items()
            if self.metrics is None or name in self.metrics
        }


def _form(sample: Any) -> str:
    """In words, what a batch of such samples could be made of."""
    if isinstance(sample, Mapping):
        return f"a mapping with {sorted(map(str, sample))}"
    if isinstance(sample, Sequence) and not isinstance(sample, str):
        return f"a row of {len(sample)}"
    return f"a {type(sample).__name__}"


class ReplayMixin(TipMixin):
    """Mixes old samples into the new ones of a DataModule: brings a :class:`ReplayCallback` to its runs.

    Give it before ``LightningDataModule``, and let the DataModule have methods ``old_dataset`` and ``old_val_dataset``.
    For somebody else's DataModule, put ``ReplayCallback`` among the Trainer's callbacks instead; it does the same.

    Args:
        *args: For the DataModule.
        old: As in :class:`ReplayCallback`.
        replay_share: Its ``share``.
        replay_memory: Its ``memory``.
        old_validation: As there.
        replay_options: Its other arguments.
        **kwargs: For the DataModule.

    Example:
        >>> from lightning.pytorch import LightningDataModule
        >>> class MyData(ReplayMixin, LightningDataModule):
        ...     '''With the loaders of the new data, old_dataset() and old_val_dataset().'''
        >>> data = MyData(replay_share=0.5)
    """

    def __init__(
        self,
        *args: Any,
        old: Dataset | str = "old_dataset",
        replay_share: float = 0.25,
        replay_memory: int | None = None,
        old_validation: Dataset | str | None = "old_val_dataset",
        replay_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.bring(ReplayCallback(old, replay_share, replay_memory, old_validation, **(replay_options or {})))
