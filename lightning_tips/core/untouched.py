"""Running things in the middle of a run without a trace: random generators, modes and buffers as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["keep_values", "same_random_numbers", "unchanged"]


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
        (module, name, buffer, keep_values(buffer))
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
        for module, name, buffer, put_back in buffers:
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            put_back()


def keep_values(tensor: Tensor) -> Callable[[], None]:
    """A function that gives a tensor the values again that it has now, in place. Nested ones are left alone."""
    if tensor.is_meta or tensor.is_nested:
        return lambda: None
    before = tensor.detach().clone()
    strided = tensor.layout == torch.strided
    version = None if strided else tensor._version  # of other layouts the values cannot be compared

    def put_back() -> None:
        if tensor.shape != before.shape:
            return
        if not torch.equal(tensor, before) if strided else tensor._version != version:
            with torch.no_grad():
                tensor.copy_(before)

    return put_back
