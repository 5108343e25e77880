"""The teacher: what a network makes of unlabelled samples, without a trace on the run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_tips.core import agree, callbacks_of, inputs_of, reason_of
from lightning_tips.core.lightning_private import batch_on_device
from lightning_tips.data.pseudo_labels import Outputs, as_probabilities

__all__ = ["Teacher", "best_checkpoint", "check_weights", "read_weights", "teacher_probabilities"]


def teacher_probabilities(
    trainer: pl.Trainer,
    networks: list[Callable[[], Any]],
    dataset: Any,
    indices: Sequence[int],
    like: DataLoader[Any],
    seed: int,
    input_key: str | None = None,
    outputs: Outputs = "auto",
) -> Tensor:
    """The mean probabilities of one or more networks for samples of a dataset; the ranks share the work.

    Args:
        trainer: The trainer of the running fit; all its ranks must call.
        networks: Each returns a context, in which there is a network to call.
        dataset: Its samples have the form of training samples; their labels are not looked at.
        indices: (N,) which of them, at least one.
        like: The training loader: its batch size, workers and collate function are used.
        seed: For datasets with random transforms.
        input_key: Key of the inputs in batches that are mappings.
        outputs: What the networks return, see ``as_probabilities``.

    Returns:
        (N, C) float32 on the CPU, the same on every rank.
    """
    size, world, rank = len(indices), trainer.world_size, trainer.global_rank
    each = -(-size // world)
    # Every rank makes the same number of calls: a sharded network waits for all of them.
    mine = [int(indices[(rank + world * i) % size]) for i in range(each)]
    total: Tensor | None = None
    for number, network in enumerate(networks):
        with network() as model:
            torch.default_generator.manual_seed(seed + number)  # datasets draw from the CPU's
            random.seed(seed + number)
            np.random.seed((seed + number) % (1 << 32))
            loader = DataLoader(
                dataset,
                batch_size=like.batch_size,
                sampler=mine,
                num_workers=like.num_workers,
                collate_fn=like.collate_fn,
                worker_init_fn=like.worker_init_fn,
                multiprocessing_context=like.multiprocessing_context,
            )
            rows = []
            with trainer.precision_plugin.forward_context():
                for batch in loader:
                    inputs = _inputs_of(batch_on_device(trainer, batch), input_key)
                    rows.append(as_probabilities(model(inputs), outputs))
            found = torch.cat(rows)
        total = found if total is None else total + found
    assert total is not None
    total = total / len(networks)
    if world > 1:
        # A sum with zeros is exact, and every strategy and device has one.
        gathered = total.new_zeros(each, world, total.shape[1])
        gathered[:, rank] = total
        total = trainer.strategy.reduce(gathered, reduce_op="sum").reshape(-1, total.shape[1])[:size]
    return total.cpu()


def _inputs_of(batch: Any, input_key: str | None) -> Any:
    try:
        return inputs_of(batch, input_key)
    except (KeyError, TypeError) as error:
        raise MisconfigurationException(f"PseudoLabelCallback: {reason_of(error)}") from error


# ---- who it is


class Teacher:
    """Who labels: the module as it is, with the weights of checkpoints, or another module.

    Args:
        given: ``"current"``, ``"best"``, a path or several, or a module.
        checkpoint: Weights for a module.
    """

    def __init__(self, given: nn.Module | list[str] | str, checkpoint: str | None = None) -> None:
        if checkpoint is not None and not isinstance(given, nn.Module):
            raise ValueError("teacher_checkpoint is for a teacher that is a module; give paths as teacher=...")
        if isinstance(given, list) and not given:
            raise ValueError("teacher=[] names no checkpoint.")
        self.given, self.checkpoint = given, checkpoint

    @property
    def name(self) -> str:
        """For people."""
        if isinstance(self.given, nn.Module):
            return type(self.given).__name__
        if self.given in ("current", "best"):
            return f"the {self.given} network"
        return f"{len(self._paths)} checkpoint{'s' if len(self._paths) > 1 else ''}"

    @property
    def _paths(self) -> list[str]:
        if isinstance(self.given, list):
            return self.given
        return [self.given] if isinstance(self.given, str) and self.given not in ("current", "best") else []

    def prepare(self, trainer: pl.Trainer, asker: str) -> None:
        """The start of a fit: refuses what cannot work, loads the weights of a module.

        Raises:
            MisconfigurationException: If a checkpoint is missing or of another module, or the strategy shards.
        """
        if self.given != "current" and isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                f'Under {type(trainer.strategy).__name__} {asker} works with teacher="current" only.'
            )
        if self.given == "best":
            best_checkpoint(trainer)  # raises
        if isinstance(self.given, nn.Module) and self.checkpoint is not None:
            weights = read_weights(self.checkpoint)
            check_weights(self.given, weights, self.checkpoint)
            self.given.load_state_dict(weights)

    def check(self, module: nn.Module) -> None:
        """Before the first step: whether checkpoints are there and fit the module."""
        for path in self._paths:
            check_weights(module, read_weights(path), path)

    def modules(self, module: nn.Module) -> list[nn.Module]:
        """What is run."""
        return [module, self.given] if isinstance(self.given, nn.Module) else [module]

    def of(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[list[Callable[[], Any]], str]:
        """Contexts, in each of which there is a network to call; and what they are now."""
        if isinstance(self.given, nn.Module):
            network = self.given.to(module.device)
            return [lambda: nullcontext(network)], self.name
        paths, name = self._paths, self.name
        if self.given == "best":
            best = best_checkpoint(trainer)
            paths, name = ([best], name) if best else ([], "the current network (there is no best one yet)")
        if not paths:
            return [lambda: nullcontext(module)], name
        return [partial(_with_weights_of, module, path) for path in paths], name


def best_checkpoint(trainer: pl.Trainer) -> str:
    """The best checkpoint that the run has written until now, as rank 0 sees it; empty if there is none yet.

    Raises:
        MisconfigurationException: If nobody keeps the best one.
    """
    keeping = [c for c in callbacks_of(trainer) if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    if not keeping:
        raise MisconfigurationException(
            'teacher="best" needs a ModelCheckpoint with a monitor among the callbacks, or there is no best checkpoint.'
            ' Add one, or use teacher="current".'
        )
    return agree(trainer, keeping[0].best_model_path)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of Lightning, or in a bare ``state_dict``.

    Raises:
        MisconfigurationException: If there is no such file, or no weights in it.
    """
    if not Path(path).is_file():
        raise MisconfigurationException(f"There is no checkpoint {path} for the teacher of pseudo-labels.")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    weights = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise MisconfigurationException(f"{path} holds no weights: give a checkpoint of Lightning or a state_dict.")
    return weights


def check_weights(network: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises unless weights fit a network.

    Raises:
        MisconfigurationException: With what to do.
    """
    own = network.state_dict()
    wrong = sorted(set(own) ^ set(weights)) or [n for n, value in weights.items() if value.shape != own[n].shape]
    if wrong:
        raise MisconfigurationException(
            f"The weights in {path} are not those of {type(network).__name__}: {wrong[0]} is missing in one of them, or"
            " has another shape. For a teacher of another kind pass it as a module (in yaml class_path and init_args),"
            " and its file as teacher_checkpoint."
        )


@contextmanager
def _with_weights_of(network: nn.Module, path: str) -> Iterator[nn.Module]:
    """The network has other weights for a while. No copy of it is made, which not every module would stand."""
    weights = read_weights(path)
    check_weights(network, weights, path)
    before = {name: value.detach().clone() for name, value in network.state_dict().items()}
    try:
        network.load_state_dict(weights)
        yield network
    finally:
        network.load_state_dict(before)
