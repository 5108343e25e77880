"""The command `lightning-tips`: LightningCLI's subcommands, with ours beside them. One file for each of ours."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_tips.cli.commands import COMMANDS
from lightning_tips.cli.run import BuildCLI, TipsCLI, check_checkpoint

__all__ = ["COMMANDS", "BuildCLI", "TipsCLI", "check_checkpoint", "main"]


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``lightning-tips``.

    Args:
        arguments: What would stand on the command line; by default what does.
    """
    given, arguments = arguments, sys.argv[1:] if arguments is None else arguments
    # Lightning 2.6 trips over a deprecation of torch 2.14 in each run; no user can do anything about it.
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    if arguments and arguments[0] in COMMANDS:
        module, _, function = COMMANDS[arguments[0]][0].partition(":")
        with _sigterm_raises():
            return int(getattr(importlib.import_module(module), function)(arguments[1:]))
    TipsCLI(args=given)
    return 0


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM as an exception: a command that has started processes ends them too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
