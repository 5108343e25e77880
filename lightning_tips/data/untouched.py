"""Running the network of a training run for something else, without a trace on the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import nn

from lightning_tips.core import unchanged

__all__ = ["untouched"]


@contextmanager
def untouched(trainer: pl.Trainer, *networks: nn.Module, log: Callable[..., None] | None = None) -> Iterator[None]:
    """Networks run in eval mode and as in validation, and all is as it was afterwards.

    That is: the modes of all their parts, their buffers, and the random states of Python, numpy and torch. No gradients
    are recorded. What the modules log goes to ``log``, or nowhere.

    Args:
        trainer: The trainer of the running fit.
        *networks: What is going to be run.
        log: Takes the place of ``log`` of the LightningModules among them.
    """
    logging = [part for network in networks for part in network.modules() if isinstance(part, pl.LightningModule)]
    # One that has a ``log`` of its own sends it on to another: that stays, unless nothing is to be logged.
    logging = [part for part in logging if log is None or part in networks or "log" not in vars(part)]
    own = [(part, vars(part)["log"]) for part in logging if "log" in vars(part)]
    stage = trainer.state.stage
    with unchanged(*networks), torch.no_grad():
        try:
            trainer.state.stage = RunningStage.VALIDATING
            for module in logging:
                module.__dict__["log"] = log or _log_nothing
            yield
        finally:
            trainer.state.stage = stage
            for module in logging:
                module.__dict__.pop("log", None)
            for module, before_it in own:
                module.__dict__["log"] = before_it


def _log_nothing(*_: Any, **__: Any) -> None:
    """Takes the place of a module's ``log``."""
