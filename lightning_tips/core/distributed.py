"""Agreement over ranks: one decision for all, and the check that all stayed equal."""

from __future__ import annotations

import hashlib
import os
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

T = TypeVar("T")

DEBUG_VARIABLE = "LIGHTNING_TIPS_DEBUG"


def debugging() -> bool:
    """Whether ``LIGHTNING_TIPS_DEBUG`` asks for the checks that cost time."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


def sampler_ranks(trainer: pl.Trainer) -> dict[str, int]:
    """``num_replicas`` and ``rank`` for a sampler of the run.

    Not those of the world: ranks that share one model (tensor parallel) see the same samples.
    """
    return trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}


def agree(trainer: pl.Trainer, value: T) -> T:
    """Rank 0's value, on every rank.

    A decision taken from a metric must be taken from the same metric everywhere: a module that logs without
    ``sync_dist`` has another value on each rank.

    Args:
        trainer: The trainer of the running fit; all its ranks must call.
        value: Any picklable object.
    """
    return value if trainer.world_size == 1 else trainer.strategy.broadcast(value)


def do_ranks_agree(trainer: pl.Trainer, mine: str) -> bool:
    """Whether all ranks hold the same string; all of them must call, and get the same answer."""
    if trainer.world_size == 1:
        return True
    differs = torch.tensor(float(mine != agree(trainer, mine)), device=trainer.strategy.root_device)
    return not float(trainer.strategy.reduce(differs, reduce_op="sum"))


def raise_together(trainer: pl.Trainer, error: Exception | None) -> None:
    """Raises on every rank if any of them has an error; all of them must call.

    A rank that raised alone would leave the others waiting for it at the next thing that they do together.

    Args:
        trainer: The trainer of the running fit.
        error: This rank's, which it raises itself.

    Raises:
        MisconfigurationException: On a rank that has no error, where another one has.
    """
    failed = 0
    if trainer.world_size > 1:
        mine = torch.tensor(float(error is not None), device=trainer.strategy.root_device)
        failed = int(trainer.strategy.reduce(mine, reduce_op="sum"))
    if error is not None:
        raise error
    if failed:
        raise MisconfigurationException(f"{failed} of {trainer.world_size} ranks cannot go on; they say why.")


def gather_objects(trainer: pl.Trainer, mine: T) -> list[T]:
    """Each rank's value, on all ranks, in their order; all of them must call.

    Args:
        trainer: The trainer of the running fit.
        mine: Any picklable object, of this rank.
    """
    if trainer.world_size == 1:
        return [mine]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, mine)
    return values


def gather_rows(trainer: pl.Trainer, mine: Tensor) -> Tensor:
    """The rows of all ranks, one after the other, on the CPU; ranks may have different numbers of them."""
    if trainer.world_size == 1:
        return mine
    return torch.cat([part.cpu() for part in gather_all_tensors(mine.to(trainer.strategy.root_device))])


def parameter_hash(module: nn.Module) -> str:
    """A hash of names, shapes, dtypes and bits of all parameters of ``module``.

    Sharded parameters (DTensor) are gathered first, so with them all ranks must call.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in module.named_parameters():
        tensor = parameter.detach()
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        # A copy, because what NumPy has seen cannot be resized any more, and FSDP2 frees parameters by resizing them.
        digest.update(tensor.cpu().reshape(-1).clone().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_ranks_agree(trainer: pl.Trainer, module: nn.Module, after: str) -> None:
    """Raises on every rank when the parameters are not the same on all.

    Args:
        trainer: The trainer of the running fit; all its ranks must call.
        module: What to compare, bit for bit.
        after: What was done before, for the message.

    Raises:
        RuntimeError: If any rank differs from rank 0.
    """
    if trainer.world_size == 1:
        return
    mine = parameter_hash(module)
    differs = torch.tensor(float(mine != agree(trainer, mine)), device=trainer.strategy.root_device)
    number = int(trainer.strategy.reduce(differs, reduce_op="sum"))
    if number:
        raise RuntimeError(
            f"{number} of {trainer.world_size} ranks have other parameters than rank 0 after: {after}. Training would"
            " go on with networks that drift apart. Look for code that runs on one rank only or draws unseeded"
            " random numbers."
        )
