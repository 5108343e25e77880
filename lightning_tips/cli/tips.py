"""`lightning-tips tips`: the list of the tips."""

from __future__ import annotations

import inspect
import sys

import lightning.pytorch as pl

import lightning_tips
from lightning_tips.core import TipCallback, TipMixin


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
