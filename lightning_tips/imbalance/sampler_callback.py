"""`ImbalancedSamplerCallback` and its mixin: balanced training data in any run, from Python or yaml."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from lightning_tips.core import (
    ActsOn,
    EpochSampler,
    LoaderTip,
    TipMixin,
    bin_targets,
    do_ranks_agree,
    find_labels,
    resumable,
    sampler_ranks,
)
from lightning_tips.core.lightning_private import with_sampler
from lightning_tips.imbalance.batches import ImbalancedBatchSampler
from lightning_tips.imbalance.counting import class_names
from lightning_tips.imbalance.plots import show_balance
from lightning_tips.imbalance.sampler import ImbalancedSampler
from lightning_tips.imbalance.strategies import Strategy


class ImbalancedSamplerCallback(LoaderTip):
    """Draws the training samples of each class as often as a strategy says, in any run.

    Each training DataLoader, of whatever DataModule, module or argument of ``fit`` it is, gets an
    :class:`ImbalancedSampler` in place of its own; everything else about it stays, and so do validation and test data.
    All ranks draw from one order, and a resumed run goes on with the very batches that are still due, also in the
    middle of an epoch and with workers. A loader that has an ``ImbalancedSampler`` already keeps it.

    Args:
        strategy: ``"oversample"``, ``"undersample"``, ``"sqrt"``, ``"effective"``, ``"repeat_factor"``, or the target
            mix as a dict or list of shares by class; see :func:`~lightning_tips.imbalance.target_mix`.
        num_samples: Samples of an epoch over all ranks; by default what suits the strategy.
        seed: Of the order.
        per_class_minimum: At least so many samples of each class in every batch, see :class:`ImbalancedBatchSampler`.
        beta: For ``"effective"``.
        threshold: For ``"repeat_factor"``.
        bins: For regression: into how many bins of equal count the targets fall, or the edges between bins.
        target_key: Where samples are dicts: the key of the target, if it is none of the usual ones.
        show: Whether to show the class counts before and after, as a table and a plot.

    Raises:
        MisconfigurationException: Before the first step, for data that cannot be balanced.
    """

    tip = "imbalance"
    acts_on = ActsOn.DATA

    def __init__(
        self,
        strategy: Strategy = "oversample",
        num_samples: int | None = None,
        seed: int = 0,
        per_class_minimum: int | dict[int, int] | list[int] | None = None,
        beta: float = 0.999,
        threshold: float | None = None,
        bins: int | list[float] | None = None,
        target_key: str | None = None,
        show: bool = True,
    ) -> None:
        self.strategy: Strategy = strategy
        self.num_samples = num_samples
        self.seed = seed
        self.per_class_minimum = per_class_minimum
        self.beta = beta
        self.threshold = threshold
        self.bins = bins
        self.target_key = target_key
        self.show = show
        self.samplers: list[ImbalancedSampler] = []
        """One for each training loader, once training has begun."""
        self._resumed_from: dict[str, Any] | None = None
        # What can be known to be wrong without data.
        ImbalancedSampler([0, 1], strategy if isinstance(strategy, str) else "oversample", num_samples, seed)

    def describe(self) -> str:
        """For the table at fit start."""
        how = self.strategy if isinstance(self.strategy, str) else "a given mix"
        minimum = "" if self.per_class_minimum is None else f", at least {self.per_class_minimum} of each class a batch"
        sizes = ", ".join(f"{s.epoch_size:,} samples an epoch" for s in self.samplers)
        return f"{how}{minimum}: {sizes}" if sizes else f"{how}{minimum}"

    def conflict_with(self, other: object) -> str | None:
        """Two of them would replace each other's samplers."""
        if isinstance(other, ImbalancedSamplerCallback):
            return "both choose the training samples. Keep one (the mixin brings one, too)."
        return None

    # ---- state

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self._resumed_from = None

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint: the draw, to notice a resume with another, and the prior it teaches."""
        prior = self.trained_prior
        return super().state_dict() | {
            "draws": [sampler.fingerprint for sampler in self.samplers],
            "trained_prior": None if prior is None else prior.tolist(),
            "counts": self.samplers[0].counts.tolist() if self.samplers else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`. Where in its epoch each loader is, the loaders know themselves."""
        self._resumed_from = {"draws": list(state["draws"])}

    @property
    def class_counts(self) -> Tensor | None:
        """Samples of each class in the training data ``(C,)``, once training has begun."""
        return torch.from_numpy(self.samplers[0].counts) if self.samplers else None

    @property
    def trained_prior(self) -> Tensor | None:
        """Share of each class ``(C,)`` in what the network sees; ``None`` before training and for several labels."""
        if not self.samplers or len(self.samplers[0].mix) != len(self.samplers[0].counts):
            return None
        return torch.from_numpy(self.samplers[0].mix).float()

    # ---- the samplers

    def change_loaders(self, trainer: pl.Trainer, loaders: list[DataLoader[Any]]) -> list[DataLoader[Any]]:
        """Balances them."""
        return [self._balance(trainer, loader) for loader in loaders]

    def _balance(self, trainer: pl.Trainer, loader: DataLoader[Any]) -> DataLoader[Any]:
        if isinstance(loader.sampler, ImbalancedBatchSampler) and loader.batch_size != loader.sampler.batch_size:
            raise MisconfigurationException(
                f"A training loader has batch_size={loader.batch_size}, but its ImbalancedBatchSampler makes batches of"
                f" {loader.sampler.batch_size}: the minimum of each class would not hold. Use sampler.loader(dataset)."
            )
        if isinstance(loader.sampler, ImbalancedSampler):
            # The user's own loader and sampler come out of the run as they went in. The sampler itself is used, not a
            # copy: somebody who holds it may change its mix as the run goes on.
            self.on_release(partial(_go_back, loader.sampler, loader.sampler.epoch, loader.sampler._start))
            return resumable(copy.copy(loader))
        if isinstance(loader.dataset, IterableDataset):
            raise MisconfigurationException(
                f"{type(self).__name__} cannot choose from {type(loader.dataset).__name__}: an IterableDataset decides"
                " its order itself. Use a dataset with __getitem__ and __len__, or class weights in the loss"
                " (ClassWeightCallback)."
            )
        if loader.batch_size is None and loader.batch_sampler is not None:
            raise MisconfigurationException(
                f"A training loader was made with batch_sampler={type(loader.batch_sampler).__name__}(...), in which"
                f" {type(self).__name__} cannot replace the sampler. Give the DataLoader batch_size=...; for a minimum"
                " of each class in a batch there is per_class_minimum."
            )
        if type(loader.sampler) not in (RandomSampler, SequentialSampler, DistributedSampler, EpochSampler):
            rank_zero_info(f"{type(self).__name__} replaces the {type(loader.sampler).__name__} of a training loader.")
        sampler, problem = None, None
        try:
            sampler = self._make(trainer, loader)
        except (ValueError, TypeError) as error:
            problem = error
        # First all ranks meet, then they raise: one that raised alone would leave the others waiting.
        same = do_ranks_agree(trainer, f"{problem}" if sampler is None else sampler.fingerprint)
        if sampler is None:
            raise MisconfigurationException(f"{type(self).__name__}: {problem}") from problem
        if not same:
            raise MisconfigurationException(
                f"The ranks have different training labels, so {type(self).__name__} cannot share them out. A split"
                " without a seed does that: give random_split a generator with one."
            )
        return resumable(with_sampler(loader, sampler))

    def _make(self, trainer: pl.Trainer, loader: DataLoader[Any]) -> ImbalancedSampler:
        labels = find_labels(loader.dataset, self.target_key, trainer.is_global_zero, raw=self.bins is not None)
        if self.bins is not None:
            labels = bin_targets(labels, self.bins)
        given: dict[str, Any] = {
            "strategy": self.strategy,
            "num_samples": self.num_samples,
            "seed": self.seed,
            **sampler_ranks(trainer),
            "beta": self.beta,
            "threshold": self.threshold,
        }
        if self.per_class_minimum is None:
            return ImbalancedSampler(labels, **given)
        if loader.batch_size is None:
            raise ValueError("per_class_minimum needs a DataLoader with a batch_size.")
        return ImbalancedBatchSampler(labels, loader.batch_size, self.per_class_minimum, **given)

    # ---- what the user sees

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells once what the draw is."""
        super().on_train_start(trainer, pl_module)
        before, self._resumed_from = self._resumed_from, None
        now = [sampler.fingerprint for sampler in self.samplers]
        if before is not None and before["draws"] and before["draws"] != now:
            self.record(trainer, "other samples than before the resume", epoch_size=self.samplers[0].epoch_size)
        if not self.events:
            for sampler in self.samplers:
                drawn = sampler.draws_per_class()
                self.record(
                    trainer,
                    self.strategy if isinstance(self.strategy, str) else "given mix",
                    classes=len(sampler.counts),
                    ratio_before=float(sampler.counts.max() / max(sampler.counts.min(), 1)),
                    ratio=float(drawn.max() / drawn[drawn > 0].min()),
                    epoch_size=sampler.epoch_size,
                )
        names = class_names(trainer)
        for number, sampler in enumerate(self.samplers if self.show else []):
            # The last one, with several labels a sample, is of the samples without any.
            drawn = sampler.draws_per_class()[: len(sampler.counts)]
            picture = f"class_balance_{number}" if number else "class_balance"
            show_balance(trainer, sampler.counts, drawn, "drawn an epoch", names, picture)


def _go_back(sampler: ImbalancedSampler, epoch: int, start: tuple[int, int] | None) -> None:
    sampler.epoch, sampler._start = epoch, start


class ImbalancedSamplerMixin(TipMixin):
    """Balances the training data of a DataModule: brings an :class:`ImbalancedSamplerCallback` to its runs.

    Give it before ``LightningDataModule``. For somebody else's DataModule, put ``ImbalancedSamplerCallback`` among the
    Trainer's callbacks instead; it does the same.

    Args:
        *args: For the DataModule.
        sampling: The ``strategy`` of :class:`ImbalancedSamplerCallback`.
        sampling_seed: Its ``seed``.
        samples_per_epoch: Its ``num_samples``.
        per_class_minimum: As there.
        **kwargs: For the DataModule.

    Example:
        >>> from lightning.pytorch import LightningDataModule
        >>> class MyData(ImbalancedSamplerMixin, LightningDataModule):
        ...     '''With a train_dataloader like any other.'''
        >>> data = MyData(sampling="undersample")
    """

    def __init__(
        self,
        *args: Any,
        sampling: Strategy = "oversample",
        sampling_seed: int = 0,
        samples_per_epoch: int | None = None,
        per_class_minimum: int | dict[int, int] | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.bring(ImbalancedSamplerCallback(sampling, samples_per_epoch, sampling_seed, per_class_minimum))
