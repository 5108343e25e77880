"""Running things in the middle of a run without a trace: random generators, modes and buffers as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

__all__ = ["same_random_numbers", "unchanged"]


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Afterwards all generators of torch, NumPy and Python are where they were (Lightning's: not after an error)."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


@contextmanager
def unchanged(*networks: nn.Module) -> Iterator[None]:
    """While it is open, networks are in eval mode; then modes, buffers and all random states are what they were."""
    modules = [module for network in networks for module in network.modules()]
    modes = [(module, module.training) for module in modules]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        with same_random_numbers():
            for network in networks:
                network.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)
                if buffer.shape == before.shape and not torch.equal(buffer, before):
                    buffer.copy_(before)
