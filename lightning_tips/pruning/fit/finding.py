"""Which network a module trains, and what it is called with: given, or seen in the first batch of training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_tips.core import TipCallback, agree, say
from lightning_tips.pruning.fit.capture import (
    Capture,
    Inputs,
    Sample,
    find_network,
    first_samples,
    is_validation_of_fit,
    networks_in,
    probe,
)

EXAMPLES = 2  # samples to plan on; BatchNorm needs two


class NetworkFinder(TipCallback):
    """A tip that knows which network it is about, and keeps a sample of what that is called with.

    Args:
        module: Name of the network within the LightningModule.
        example_inputs: What it takes: a tensor, a tuple of arguments or a dict of them.
        samples: How many samples of training to keep.
        sample_megabytes: How much memory, and room in a checkpoint, they may take.
    """

    def __init__(self, module: str | None, example_inputs: Any, samples: int, sample_megabytes: float) -> None:
        self.module = module
        self.example_inputs = example_inputs
        self._sample = Sample(samples, sample_megabytes)
        self._capture: Capture | None = None

    # ---- state

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self._network: str | None = None  # name of what is pruned, once known
        self._example: Inputs | None = None
        self._sample.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        found = {"network": self._network, "example": self._example, "sample": self._sample.state_dict()}
        return super().state_dict() | found

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`."""
        super().restore(state)
        self._network = state["network"]
        self._example = state["example"]
        self._sample.load_state_dict(state["sample"])

    # ---- which network

    @property
    def found(self) -> tuple[str, Inputs] | None:
        """Name of the network within the module, "" for all of it, and two samples of its inputs; once known."""
        return None if self._network is None or self._example is None else (self._network, self._example)

    def _holders(self, module: nn.Module) -> list[str]:
        """Names of the submodules that the network may be."""
        return networks_in(module)

    def _target(self, pl_module: pl.LightningModule) -> tuple[nn.Module, Inputs]:
        assert self._network is not None
        assert self._example is not None
        return find_network(pl_module, self._network), self._example

    def _take_given_example(self, trainer: pl.Trainer) -> None:
        given = self.example_inputs
        module = trainer.lightning_module
        if given is not None and not self.module and not is_overridden("forward", module, pl.LightningModule):
            raise MisconfigurationException(
                f"{type(self).__name__}: example_inputs are of the whole {type(module).__name__}, which has no forward."
                " Name the network that they are of, with module=..."
            )
        if isinstance(given, list) and given and all(isinstance(size, int) for size in given):
            # A yaml can give a shape only.
            given = torch.rand(given, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        if given is not None:
            self._know(trainer, self.module or "", _as_inputs(given))

    def _know(self, trainer: pl.Trainer, name: str | None, inputs: Inputs | None) -> None:
        """Takes rank 0's finding."""
        name, example = agree(trainer, (name, None if inputs is None else first_samples(inputs, EXAMPLES)))
        if example is not None:
            self._network, self._example = name, example

    def _find(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Inputs | None:
        """Looks what a training step calls with this batch, and returns that, on each rank its own."""
        name = self._network if self._example is not None else self.module
        found = probe(trainer, pl_module, batch, name if name is not None else self._holders(pl_module))
        if self._example is None:
            self._know(trainer, found.name, found.inputs)
            if not found.trains:
                say(trainer, f"{type(self).__name__} prunes {self._network!r}, though nothing in it trains now.")
        own = getattr(pl_module, "example_input_array", None)
        if self._example is None and own is not None and self.module in (None, ""):
            self._know(trainer, "", _as_inputs(own))
        if self._example is None:
            step = f"training_step of {type(pl_module).__name__}"
            if found.passed_over:
                name = found.passed_over[0]
                raise MisconfigurationException(
                    f"{type(self).__name__}: {step} calls {name!r} without gradients, and no other network. Pass"
                    f" module={name!r} if that is what to prune, else the name of the network."
                )
            named = "" if self.module is None else f" named {self.module!r}"
            raise MisconfigurationException(
                f"{type(self).__name__} did not find what the network is called with: {step} called no module with"
                f" convolutions{named} before its first backward pass. Pass module='name of the network' and"
                " example_inputs, a tensor or a tuple of what it takes."
            )
        return found.inputs

    # ---- what it is called with in validation

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Looks what the network is called with, where a subclass wants to know."""
        if is_validation_of_fit(trainer) and self._wants_validation():
            self._capture = Capture(pl_module, self._network if self._network is not None else self._holders(pl_module))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes it."""
        if is_validation_of_fit(trainer) and self._wants_validation():
            self._take_validation(trainer, self._captured()[1])

    def _wants_validation(self) -> bool:
        """Whether a subclass wants inputs from validation batches. The same on all ranks."""
        return False

    def _take_validation(self, trainer: pl.Trainer, inputs: Inputs | None) -> None:
        """What a subclass wants of it."""

    def _captured(self) -> tuple[str | None, Inputs | None]:
        capture, self._capture = self._capture, None
        if capture is None:
            return None, None
        capture.remove()
        return capture.name, capture.inputs


def _as_inputs(given: Any) -> Inputs:
    if isinstance(given, dict):
        return dict(given)
    return tuple(given) if isinstance(given, list | tuple) else (given,)
