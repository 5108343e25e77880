"""A training step that is only looked at: what it does to its module is taken back."""

from __future__ import annotations

import copy
import functools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_tips.core import keep_values

LARGEST = 2**28
"""Bytes of a tensor that is looked after. Of whole datasets, kept in a module, a second copy may not fit."""

_REGISTRIES = {name for name in vars(nn.Module()) if name != "training"}
"""Where a module keeps its parameters, buffers, submodules and hooks: these attributes are no plain ones."""
_LISTS = (list, deque)
_CONTAINERS = (*_LISTS, dict, set, defaultdict, OrderedDict, Counter)


@contextmanager
def undone(module: nn.Module) -> Iterator[None]:
    """Afterwards a module and its submodules are as they were.

    That is: modes, parameters' ``requires_grad``, buffers, and which object each plain attribute is, with what is in it
    where it is a tensor, a container of Python or a random generator. Values of parameters are not looked after, nor
    tensors of more than 256 MB.
    """
    parts = list(module.modules())
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    modes = [part.training for part in parts]
    attributes = [{name: value for name, value in vars(part).items() if name not in _REGISTRIES} for part in parts]
    buffers = [dict(part._buffers) for part in parts]
    held = [value for own in attributes for value in own.values()]
    put_back = [again for value in [*module.buffers(), *held] for again in _contents(value)]
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        for part, training, own, tensors in zip(parts, modes, attributes, buffers, strict=True):
            for name in vars(part).keys() - own.keys() - _REGISTRIES:
                del vars(part)[name]
            vars(part).update(own)
            part._buffers.update(tensors)
            part.training = training
        for again in put_back:
            again()


def _contents(value: Any) -> Iterator[Callable[[], None]]:
    """Functions that put back what is in an object now."""
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter) and value.numel() * value.element_size() <= LARGEST:
            yield keep_values(value)
    elif type(value) in _CONTAINERS:
        for part in value.values() if isinstance(value, dict) else value:
            if type(part) in _CONTAINERS:
                yield from _contents(part)
        yield _refill(value, copy.copy(value))
    elif isinstance(value, torch.Generator):
        yield functools.partial(_set_state, value, value.get_state())
    elif isinstance(value, random.Random):
        drawn = value.getstate()
        yield lambda: value.setstate(drawn)
    elif isinstance(value, np.random.Generator):
        bits = copy.deepcopy(value.bit_generator.state)
        yield lambda: setattr(value.bit_generator, "state", bits)


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _refill(container: Any, content: Any) -> Callable[[], None]:
    def again() -> None:
        container.clear()
        container.extend(content) if isinstance(container, _LISTS) else container.update(content)

    return again
