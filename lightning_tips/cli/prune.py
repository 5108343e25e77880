"""`lightning-tips prune`: from the yaml of ``fit`` and a trained checkpoint to a smaller one with a report."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_tips.cli.run import TipsCLI
from lightning_tips.pruning import FilterPruningCallback
from lightning_tips.pruning.command.export import choose_kinds
from lightning_tips.pruning.command.prune import prune_checkpoint
from lightning_tips.pruning.fit.base import PruningCallback

OPTIONS = tuple(inspect.signature(FilterPruningCallback).parameters)


class PruningTrainer(pl.Trainer):
    """A Trainer whose one subcommand is ``prune``."""

    def prune(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        export: list[Literal["torch", "onnx"]] | None = None,
        keep: Literal["last", "best"] = "last",
        sensitivity: float | None = None,
        batch_sizes: Sequence[int] = (1, 256),
        repeats: int = 30,
        out: str | None = None,
    ) -> None:
        """Prunes and fine-tunes a trained checkpoint, for trainer.max_epochs; writes it, its exports and a report.

        Args:
            model: The module.
            datamodule: Its data.
            ckpt_path: The trained checkpoint. Its weights are taken; optimizers start fresh.
            weights_only: false for a checkpoint with objects in it that you trust.
            export: Formats, as [torch] or [torch,onnx]; by default all that can be written here, [] for none.
            keep: Which weights are written: of the last epoch, or of ModelCheckpoint's best since the last step.
            sensitivity: Tries every layer alone first; none loses more channels than cost so much of the monitor.
            batch_sizes: For which time and memory are measured.
            repeats: Measured passes of each network.
            out: Folder for all of it; by default the run's own.
        """
        prune_checkpoint(
            self,
            model,
            str(ckpt_path),
            datamodule,
            export=export,
            keep=keep,
            sensitivity_drop=sensitivity,
            batch_sizes=batch_sizes,
            repeats=repeats,
            out=out,
            weights_only=weights_only,
        )


class _PruneCLI(TipsCLI):
    """LightningCLI with ``prune`` as its only subcommand, and the arguments of FilterPruningCallback as its options."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"prune": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(FilterPruningCallback, None)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        self._path = self.config.prune.ckpt_path
        # Out of sight of LightningCLI, which would put the checkpoint's hyper-parameters over the yaml's, and fails on
        # those of a module that was not made by it.
        self.config.prune.ckpt_path = None

    def before_instantiate_classes(self) -> None:
        if not self._path:
            sys.exit("error: --ckpt_path is missing: the trained checkpoint to prune.")
        self.config.prune.ckpt_path = self._path
        try:
            choose_kinds(self.config.prune.export)
        except ValueError as error:
            sys.exit(f"error: {error}")
        super().before_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        given = self._options()
        own = self._get(self.config_init, "trainer").get("callbacks") or []
        own = own if isinstance(own, list) else [own]  # a yaml may say one alone
        tips = [c for c in own if isinstance(c, PruningCallback)]
        if not tips:
            self._get(self.config_init, "trainer")["callbacks"] = [*own, self._callback()]
        elif given:
            sys.exit(
                f"error: the yaml has a {type(tips[0]).__name__} already, so --{' and --'.join(given)} would say"
                f" nothing. Take them away, or change the callback: --trainer.callbacks.{given[0]} ..."
            )
        return super().instantiate_trainer(**kwargs)

    def _callback(self) -> FilterPruningCallback:
        try:
            return FilterPruningCallback(**{name: self._get(self.config_init, name) for name in OPTIONS})
        except ValueError as error:
            sys.exit(f"error: {error}")

    def _options(self) -> list[str]:
        """The options of the callback that were given, by whatever way."""
        defaults = inspect.signature(FilterPruningCallback).parameters
        return [name for name in OPTIONS if self._get(self.config, name) != defaults[name].default]


def prune(arguments: list[str]) -> int:
    """Prunes a trained checkpoint: ``lightning-tips prune --config run.yaml --ckpt_path last.ckpt --target.macs 0.5``.

    Args:
        arguments: What stands behind ``prune``.
    """
    sys.argv = [sys.argv[0], "prune", *arguments]  # LightningCLI warns of arguments that are given beside those
    try:
        _PruneCLI(trainer_class=PruningTrainer)
    except (MisconfigurationException, ValueError) as error:
        sys.exit(f"error: {error}")
    return 0
