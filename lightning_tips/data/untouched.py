"""Running the network of a training run for something else, without a trace on the run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import nn

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
    modes = [(part, part.training) for network in networks for part in network.modules()]
    buffers = [(b, b.detach().clone()) for network in networks for b in network.buffers()]
    python, numpy_state = random.getstate(), np.random.get_state()
    logging = [part for network in networks for part in network.modules() if isinstance(part, pl.LightningModule)]
    # One that has a ``log`` of its own sends it on to another: that stays, unless nothing is to be logged.
    logging = [part for part in logging if log is None or part in networks or "log" not in vars(part)]
    own = [(part, vars(part)["log"]) for part in logging if "log" in vars(part)]
    stage = trainer.state.stage
    devices = {
        b.device.index or 0 for n in networks for b in [*n.parameters(), *n.buffers()] if b.device.type == "cuda"
    }
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
        try:
            trainer.state.stage = RunningStage.VALIDATING
            for network in networks:
                network.eval()
            for module in logging:
                module.__dict__["log"] = log or _log_nothing
            yield
        finally:
            trainer.state.stage = stage
            for module in logging:
                module.__dict__.pop("log", None)
            for module, before_it in own:
                module.__dict__["log"] = before_it
            for part, training in modes:
                part.training = training
            for buffer, before in buffers:
                if buffer.shape == before.shape and not torch.equal(buffer, before):
                    buffer.copy_(before)
            random.setstate(python)
            np.random.set_state(numpy_state)


def _log_nothing(*_: Any, **__: Any) -> None:
    """Takes the place of a module's ``log``."""
