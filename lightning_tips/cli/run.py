"""LightningCLI as it is here: what each command that reads a yaml of ``fit`` is built on."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_tips.vision  # noqa: F401 - gives the reference classes short names
from lightning_tips import RunReportCallback
from lightning_tips.cli.commands import COMMANDS
from lightning_tips.cli.parser import TipsArgumentParser, closest
from lightning_tips.core import accept_other_shapes
from lightning_tips.pruning.command.prune import is_pruned


class TipsCLI(LightningCLI):
    """LightningCLI with a run report, W&B offline where there is no login, and clear words on bad checkpoints.

    Any LightningModule and LightningDataModule can be named in ``model`` and ``data``; short names work for ours and
    for imported classes.
    """

    def __init__(self, **kwargs: Any) -> None:
        settings: dict[str, Any] = {
            "parser_class": TipsArgumentParser,
            "parser_kwargs": {"default_env": True, "env_prefix": "LIGHTNING_TIPS"},
            # A resumed run goes on in the folder of the run it resumes.
            "save_config_kwargs": {"overwrite": True},
            "seed_everything_default": 0,
        }
        super().__init__(**settings | kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Names our own subcommands in the help."""
        ours = ", ".join(f"{name} ({about})" for name, (_, about) in COMMANDS.items())
        return super().init_parser(**{"prog": "lightning-tips", "epilog": f"Besides: {ours}"} | kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run report as ``report``."""
        parser.add_lightning_class_args(RunReportCallback, "report")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, then looks at the checkpoint before anything is built from it."""
        super().parse_arguments(parser, args)
        given = self.config.get(str(self.config.get("subcommand")), {})
        path = given.get("ckpt_path")
        if path and path not in ("best", "last", "hpc"):
            check_checkpoint(str(path), given.get("weights_only"))

    def after_instantiate_classes(self) -> None:
        """Lets the module take a pruned checkpoint, also where the yaml names no callback that would."""
        path = self.config.get(str(self.config.get("subcommand")), {}).get("ckpt_path")
        if path and Path(path).is_file() and is_pruned(path):
            accept_other_shapes(self.model)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Builds the trainer; a run report that the yaml names among the callbacks takes the place of ours."""
        given = self._get(self.config_init, "trainer").get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        for report in [one for one in given if isinstance(one, RunReportCallback)]:
            scope = self.config_init[self.subcommand] if self.subcommand else self.config_init
            scope["report"] = report
            scope["trainer"]["callbacks"] = [one for one in given if one is not report]
        return super().instantiate_trainer(**kwargs)

    def before_instantiate_classes(self) -> None:
        """See :func:`wandb_without_login`."""
        if "Wandb" in str(self.config[self.config["subcommand"]].trainer.logger):
            wandb_without_login()


def wandb_without_login() -> None:
    """W&B asks for a login in the terminal, or fails without one: offline, it logs to a folder instead."""
    if "WANDB_MODE" not in os.environ:
        import wandb

        if not wandb.login(prompt=False):
            wandb.setup(settings=wandb.Settings(mode="offline"))
            print("Not logged in to Weights & Biases: logging offline. `wandb login` changes that.", flush=True)


def check_checkpoint(path: str, weights_only: bool | None = None) -> None:
    """Ends the program with a clear message when a checkpoint cannot be read.

    Args:
        path: What was given as ``ckpt_path``. Addresses, and the folders of sharded checkpoints, are left to Lightning.
        weights_only: As given on the command line; with ``False`` only existence is checked.

    Raises:
        SystemExit: If it is missing, damaged, or not a Lightning checkpoint.
    """
    file = Path(path)
    if ":" in path or file.is_dir():
        return
    if not file.exists():
        near = closest(file.name, (p.name for p in file.parent.glob("*.ckpt"))) if file.parent.is_dir() else None
        sys.exit(f"error: there is no checkpoint {file}" + (f"; did you mean {file.parent / near}?" if near else ""))
    if weights_only is False:
        return
    try:
        keys = set(torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)))
    except Exception as error:  # torch raises many kinds for a file that is cut off or of another format
        if "GLOBAL" in str(error):
            return  # whole, but with objects in it: Lightning says how to load such a one
        sys.exit(
            f"error: {file} is damaged or no checkpoint ({type(error).__name__}: {str(error).splitlines()[0]}). It was"
            " probably cut off while it was written; use an earlier one."
        )
    if "state_dict" not in keys:
        sys.exit(f"error: {file} is no Lightning checkpoint: it holds {sorted(map(str, keys))[:8]}, no state_dict.")


class BuildCLI(TipsCLI):
    """Builds all that a yaml for ``fit`` names and runs nothing; without its loggers, which would begin a run."""

    loggers: Any = None
    """What was named."""

    def before_instantiate_classes(self) -> None:
        """Takes the loggers away."""
        self.loggers = Namespace(given=self.config.trainer.logger).as_dict()["given"]
        self.config.trainer.logger = False


class ParseCLI(BuildCLI):
    """Reads a yaml for ``fit`` and builds nothing of it until asked to."""

    def instantiate_classes(self) -> None:
        """Later: :meth:`build`."""

    def build(self) -> None:
        """Builds all that the yaml names."""
        super().instantiate_classes()

    def read(self, arguments: Sequence[str]) -> dict[str, Any]:
        """A whole configuration as plain data."""
        return self.plain(self.parser.parse_args(list(arguments)))

    def plain(self, config: Any) -> dict[str, Any]:
        """The same of a configuration that has been read."""
        return dict(yaml.safe_load(self.parser.dump(config, skip_none=False)))

    def short(self, arguments: Sequence[str]) -> str:
        """A configuration as a yaml for people: without what is as by default."""
        return str(self.parser.dump(self.parser.parse_args(list(arguments)), skip_none=True, skip_default=True))
