"""Features of frozen layers in a run: kept in phases in which only the head trains. A callback says when."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
from torch import nn

from lightning_tips.core import say
from lightning_tips.transfer import checks
from lightning_tips.transfer.cache import FeatureCache
from lightning_tips.transfer.freeze import BatchNormPolicy
from lightning_tips.transfer.heads import where_to_cache
from lightning_tips.transfer.layers import LayerGroup
from lightning_tips.transfer.schedule import Phase


class PhaseFeatures:
    """The feature cache of a run, phase by phase.

    Args:
        asker: The name of the callback, and its tip, for messages.
        gigabytes: What the features may take, in each process.
    """

    def __init__(self, asker: tuple[str, str], gigabytes: float) -> None:
        self._asker, self._gigabytes = asker, gigabytes
        self._cut: tuple[str, list[str]] | None = None
        self._kept: list[bool] = []  # by phase: whether the features can be
        self._cache: FeatureCache | None = None

    def prepare(
        self,
        pl_module: nn.Module,
        groups: list[LayerGroup],
        phases: list[Phase],
        names: list[list[str]],
        batch_norm: BatchNormPolicy,
        backbone: str | None,
        head: str | None,
    ) -> None:
        """Finds out which phases have features that can be kept: where all but the head is frozen, and norms too.

        Args:
            pl_module: The module.
            groups: Its layers.
            phases: The plan.
            names: The parameters that train, by phase.
            batch_norm: For phases without a policy of their own.
            backbone: As given to the callback.
            head: Likewise.

        Raises:
            ValueError: If it is not known where the head begins.
            MisconfigurationException: If there is no such phase.
        """
        self._cut = where_to_cache(pl_module, backbone, head)
        in_head = set(groups[-1].parameters)
        kept = [
            set(chosen) <= in_head and (phase.batch_norm or batch_norm) != "stats"
            for phase, chosen in zip(phases, names, strict=True)
        ]
        checks.check_cache(phases, kept, batch_norm)
        # In one epoch nothing comes twice.
        self._kept = [
            keep and (phase.epochs != 1 or phase is phases[-1]) for phase, keep in zip(phases, kept, strict=True)
        ]

    def begin(self, trainer: pl.Trainer, pl_module: nn.Module, number: int) -> None:
        """Begins a phase, of which features are kept, if that can be done, and those of the last one forgotten."""
        self.let_go(trainer)
        if self._cut is not None and self._kept[number]:
            limit = self._gigabytes * 2**30
            self._cache = FeatureCache(pl_module, *self._cut, limit, trainer.world_size, self._warn)
            self._cache.install()

    def start_epoch(self) -> None:
        """A whole epoch begins."""
        if self._cache is not None:
            self._cache.start_epoch()

    def let_go(self, trainer: pl.Trainer | None = None) -> None:
        """Gives the network its calls back; tells, if there is a trainer, what was kept."""
        if self._cache is None:
            return
        if trainer is not None and not self._cache.off:
            say(trainer, f"[{self._asker[1]}] kept {self._cache.describe()}, until epoch {trainer.current_epoch}")
        self._cache.remove()
        self._cache = None

    def _warn(self, message: str) -> None:
        # Each rank speaks for itself: it has a cache of its own.
        warnings.warn(f"{self._asker[0]}: {message}", stacklevel=2)
