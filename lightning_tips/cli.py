"""The command `lightning-tips`: LightningCLI's subcommands, with ours beside them."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import lightning_tips
import lightning_tips.vision  # gives the reference classes short names
from lightning_tips import BatchAugmentationCallback, RunReportCallback
from lightning_tips.core import TipCallback, TipMixin

# Our own subcommands: name to (function, help). The function takes the arguments behind the name and returns an exit
# code; "module:function" is imported when it is called. A tip that brings a subcommand adds a line.
COMMANDS: dict[str, tuple[str, str]] = {
    "preview": ("lightning_tips.cli:show_preview", "Draw what the augmentation of a yaml shows, without training."),
    "tips": ("lightning_tips.cli:show_tips", "List the tips, by the short names that a yaml can use."),
}


class TipsArgumentParser(LightningArgumentParser):
    """Answers a wrong name with the nearest right one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Adds the nearest right name to the message."""
        if self.exit_on_error and (near := self._nearest(message)):
            message = f"{message}\nDid you mean {near!r}?"
        super().error(message, ex)

    def _nearest(self, message: str) -> str | None:
        candidates: list[tuple[str, Callable[[re.Match[str]], Iterable[str]]]] = [
            (r"invalid choice: '(.+?)'", lambda _: [*LightningCLI.subcommands(), *COMMANDS]),
            (r"unrecognized arguments: (--[\w.]+)", lambda _: self._option_strings()),
            (r"class_path '([\w.]+)':\s+(?:Parser key .*\s+)*Option '(\w+)' is not accepted", _arguments_of),
            (r"Option '([\w.]+)' is not accepted", lambda _: {s.lstrip("-") for s in self._option_strings()}),
            (r"(?:Expected a dot import path string:|class_path) '?([\w.]+)'?", lambda _: _class_names()),
        ]
        for pattern, names in candidates:
            if match := re.search(pattern, message):
                wrong = match.group(match.lastindex or 1)
                near = _closest(wrong, names(match))
                if near and near != wrong:
                    return near
        return None

    def _option_strings(self) -> set[str]:
        parsers = [self, *getattr(self, "_subcommand_parsers", {}).values()]
        return {s for parser in parsers for action in parser._actions for s in action.option_strings}


def _closest(wrong: str, names: Iterable[str]) -> str | None:
    last = wrong.rsplit(".", 1)[-1] if "." in wrong and not wrong.startswith("-") else wrong
    folded = {name.lower(): name for name in names}
    near = difflib.get_close_matches(last.lower(), folded, n=1, cutoff=0.6)
    return folded[near[0]] if near else None


def _class_names() -> set[str]:
    bases = (pl.Callback, pl.LightningModule, pl.LightningDataModule, pl.loggers.Logger, Optimizer, LRScheduler)
    return {cls.__name__ for base in bases for cls in _subclasses(base) if not cls.__name__.startswith("_")}


def _subclasses(cls: type) -> set[type]:
    direct: set[type] = set(cls.__subclasses__())
    return direct.union(*(_subclasses(sub) for sub in direct))


def _arguments_of(match: re.Match[str]) -> list[str]:
    module, _, name = match.group(1).rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError):
        return []  # no suggestion for a class that does not exist


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

    def before_instantiate_classes(self) -> None:
        """W&B asks for a login in the terminal, or fails without one: offline, it logs to a folder instead."""
        if "WANDB_MODE" not in os.environ and "Wandb" in str(self.config[self.config["subcommand"]].trainer.logger):
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
        near = _closest(file.name, (p.name for p in file.parent.glob("*.ckpt"))) if file.parent.is_dir() else None
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


class _PreviewCLI(TipsCLI):
    """Builds everything that a yaml for ``fit`` names; without its loggers, which would begin a run."""

    def before_instantiate_classes(self) -> None:
        self.config.trainer.logger = False


def show_preview(arguments: list[str]) -> int:
    """Writes the contact sheet of a BatchAugmentationCallback: ``lightning-tips preview --config run.yaml``.

    Takes what ``fit`` takes, and ``--out`` for the PNG, by default ``augmentation.png``.
    """
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--out", type=Path, default=Path("augmentation.png"))
    chosen, rest = own.parse_known_args(arguments)
    sys.argv = [sys.argv[0], *rest]  # LightningCLI warns of arguments that are given beside those
    cli = _PreviewCLI(run=False, save_config_callback=None)
    tips = [c for c in cli.trainer.callbacks if isinstance(c, BatchAugmentationCallback)]  # type: ignore[attr-defined]
    if not tips:
        sys.exit("error: there is no BatchAugmentationCallback among trainer.callbacks, so there is nothing to show.")
    source = cli.model if cli.datamodule is None else cli.datamodule
    source.prepare_data()
    source.setup("fit")
    loader = source.train_dataloader()
    batch = next(iter(loader))
    try:
        tips[0].look_at(loader, cli.model)
        tips[0].draw(cli.trainer, batch, getattr(loader, "dataset", None), chosen.out)
    except (KeyError, TypeError, ValueError, MisconfigurationException) as error:
        sys.exit(f"error: {error.args[0]}")
    print(f"{chosen.out}: {tips[0].describe()}")
    return 0


def show_tips(arguments: list[str]) -> int:
    """Lists the tips with the first line of what they say about themselves."""
    if arguments:
        print("usage: lightning-tips tips", file=sys.stderr)
        return 2
    tips = [cls for name in lightning_tips.__all__ if isinstance(cls := getattr(lightning_tips, name), type)]
    for kind, use in _USES:
        of_kind = [cls for cls in tips if issubclass(cls, kind)]
        for cls in of_kind:
            print(f"{cls.__name__}\n    {(inspect.getdoc(cls) or '').splitlines()[0]}")
        if of_kind:
            print(f"\n{use}\n")
    return 0


_USES: list[tuple[type, str]] = [
    (TipCallback, "In a yaml, under trainer.callbacks:\n    - class_path: <name>\n      init_args: {...}"),
    (TipMixin, "In Python, for a DataModule of your own:\n    class MyData(<name>, LightningDataModule): ..."),
    (pl.LightningModule, "In a yaml, as the model:\n    model: {class_path: <name>, init_args: {...}}"),
]


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``lightning-tips``.

    Args:
        arguments: What would stand on the command line; by default what does.
    """
    given, arguments = arguments, sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        module, _, function = COMMANDS[arguments[0]][0].partition(":")
        return int(getattr(importlib.import_module(module), function)(arguments[1:]))
    # Lightning 2.6 trips over a deprecation of torch 2.14 in each run; no user can do anything about it.
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    TipsCLI(args=given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
