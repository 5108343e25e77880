"""A parser that answers a wrong name with the nearest right one."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import NoReturn

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_tips.cli.commands import COMMANDS


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
                near = closest(wrong, names(match))
                if near and near != wrong:
                    return near
        return None

    def _option_strings(self) -> set[str]:
        parsers = [self, *getattr(self, "_subcommand_parsers", {}).values()]
        return {s for parser in parsers for action in parser._actions for s in action.option_strings}


def closest(wrong: str, names: Iterable[str]) -> str | None:
    """The name that is most like a wrong one, if any is; of dotted names, by the last part."""
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
