"""The members of an ensemble: made from a factory with seeds of their own, checked, and their random numbers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_tips.core import parameter_hash

__all__ = ["RandomStream", "build_members", "member_seed", "twins"]

MemberFactory = Callable[[], pl.LightningModule]


def member_seed(seed: int | None, index: int) -> int:
    """The seed of a member: that of the ensemble plus its number.

    Args:
        seed: None: that of ``seed_everything``, or 0 without it.
        index: Number of the member.
    """
    return int(os.environ.get("PL_GLOBAL_SEED", "0") if seed is None else seed) + index


def build_members(factory: MemberFactory, n: int, seed: int | None = None) -> list[pl.LightningModule]:
    """Makes members that are alike but for their initialisation.

    Each is made under a seed of its own for torch, NumPy and ``random``; the global generators stay as they were.

    Args:
        factory: Makes an untrained module, another one at each call.
        n: How many.
        seed: See :func:`member_seed`.

    Raises:
        TypeError: If it makes something else.
        ValueError: If ``n`` is below 1, or it gives the same object twice.
    """
    if n < 1:
        raise ValueError(f"n={n}: an ensemble has at least one member.")
    members: list[pl.LightningModule] = []
    for index in range(n):
        own = member_seed(seed, index)
        with isolate_rng():
            torch.manual_seed(own)
            np.random.seed(own % 2**32)
            random.seed(own)
            member = factory()
        if not isinstance(member, pl.LightningModule):
            raise TypeError(f"member() gives a {type(member).__name__}; it must make a LightningModule.")
        if any(member is other for other in members):
            raise ValueError("member() gives the same module again; it must make another one at each call.")
        members.append(member)
    return members


def twins(members: Sequence[pl.LightningModule]) -> tuple[int, int] | None:
    """The first two members with the same parameters to the bit, if there are any."""
    seen: dict[str, int] = {}
    for index, member in enumerate(members):
        digest = parameter_hash(member)
        if digest in seen:
            return seen[digest], index
        seen[digest] = index
    return None


class RandomStream:
    """Random numbers of torch that belong to one member, for dropout and augmentation in its steps.

    What one member draws then changes nothing for another, nor for the order of the data. Covers torch's generator of
    the CPU and that of the member's CUDA device; NumPy and ``random`` are shared.

    Args:
        seed: Of both.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._cpu = torch.Generator().manual_seed(seed).get_state()
        self._cuda: Tensor | None = None

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """While it is open, torch draws from this stream."""
        on_cuda = device.type == "cuda"
        outer, outer_cuda = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_cuda else None
        torch.set_rng_state(self._cpu)
        if on_cuda:
            if self._cuda is None:
                self._cuda = torch.Generator(device).manual_seed(self.seed).get_state()
            torch.cuda.set_rng_state(self._cuda, device)
        try:
            yield
        finally:
            self._cpu = torch.get_rng_state()
            torch.set_rng_state(outer)
            if outer_cuda is not None:
                self._cuda = torch.cuda.get_rng_state(device)
                torch.cuda.set_rng_state(outer_cuda, device)

    def state_dict(self) -> dict[str, Any]:
        """The states as byte tensors."""
        return {"seed": self.seed, "cpu": self._cpu, "cuda": self._cuda}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on there."""
        self.seed, self._cpu = state["seed"], state["cpu"].cpu()
        self._cuda = None if state["cuda"] is None else state["cuda"].cpu()
