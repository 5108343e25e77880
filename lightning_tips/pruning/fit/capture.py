"""What a network is called with in a module's own steps, and a sample of it to keep.

Nobody can tell from outside what ``forward`` of some LightningModule takes, or whether a step calls it at all. So the
arguments are taken where they appear: at the first module with convolutions that a real step calls and trains.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import zip_longest
from typing import Any

import lightning.pytorch as pl
import torch
import torch.utils.checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from lightning_tips.core import did_you_mean, gather_objects
from lightning_tips.core.lightning_private import is_redirected
from lightning_tips.pruning.fit.undone import undone
from lightning_tips.pruning.networks.copies import COMPILED, logs_nothing

Inputs = tuple[Any, ...] | dict[str, Any]
"""The arguments of a call: by position, or all by name."""


class Capture:
    """Waits for the next call of a network.

    Args:
        module: The LightningModule.
        network: Name of the submodule to wait for. Or several, of which it is the first that is called to be trained:
            with gradients, and with a parameter that asks for them. A teacher is not meant. Where there is none such,
            it is the first that is frozen and called with gradients. By default all that hold convolutions.
        stop: Whether to end the step there and then, by :class:`Stopped`.

    Attributes:
        name: The network that was called: "" for the LightningModule itself.
        inputs: What it was called with, on the CPU; ``None`` until it was.
        trains: Whether it has a parameter that asks for gradients, or was named.
        passed_over: Networks that were called without gradients in training, in their order.
    """

    def __init__(self, module: nn.Module, network: str | Sequence[str] | None = None, stop: bool = False) -> None:
        self.name: str | None = None
        self.inputs: Inputs | None = None
        self.trains = True
        self.passed_over: list[str] = []
        self._stop = stop
        self._frozen: tuple[str, Inputs] | None = None
        names = networks_in(module) if network is None else [network] if isinstance(network, str) else network
        any_of_them = not isinstance(network, str)
        self._to_train = any_of_them and module.training  # of the whole: a teacher is in eval mode by itself
        self._handles: list[RemovableHandle] = []
        for name in names:
            part = module.get_submodule(name)
            # Asked now: a step may freeze for a moment what it does not train by one of its optimizers.
            frozen = any_of_them and not any(parameter.requires_grad for parameter in part.parameters())
            self._handles.append(part.register_forward_pre_hook(self._hook(name, frozen), with_kwargs=True))

    def _hook(self, name: str, frozen: bool) -> Callable[..., None]:
        def note(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Under DDP a whole step goes through the module's `forward`, with the batch as argument.
            if self.inputs is not None or is_redirected(network):
                return
            if self._to_train and not torch.is_grad_enabled() and not _will_run_again():
                self.passed_over.append(name)
                return
            if frozen and self._frozen is not None:
                return
            inputs = _copied(as_inputs(network, args, kwargs), _dtype(network))
            if frozen:
                self._frozen = name, inputs
                return
            self.name, self.inputs = name, inputs
            if self._stop:
                raise Stopped

        # Dynamo would look into it, and its imports take seconds where nobody uses it.
        return torch.compiler.disable(note) if "torch._dynamo" in sys.modules else note

    def remove(self) -> None:
        """Stops waiting."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.inputs is None and self._frozen is not None:
            (self.name, self.inputs), self.trains = self._frozen, False
        self._frozen = None


def _will_run_again() -> bool:
    """Whether this is the first pass of a gradient checkpoint: without gradients, which its second one computes."""
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
    return False


class Stopped(Exception):
    """The step was ended at its first call of a network."""


def probe(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, network: str | Sequence[str] | None) -> Capture:
    """Runs a training step up to its first call of a network, or its first backward pass, and no further.

    Nothing is trained, logged or drawn from a random number generator by that, and the step runs on a copy of the
    batch. What it has done to the module is undone, see :func:`undone`.

    Args:
        trainer: The trainer, in its training loop.
        module: The LightningModule.
        batch: The batch, on the device.
        network: See :class:`Capture`.
    """
    capture = Capture(module, network, stop=True)
    # By position, as Lightning does: somebody may call it `_`.
    takes_number = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    strategy = vars(trainer.strategy)
    replaced = {"backward": strategy["backward"]} if "backward" in strategy else {}
    strategy["backward"] = stop  # what `manual_backward` calls
    try:
        with ExitStack() as stack:
            for context in (isolate_rng(), undone(module), logs_nothing(module), suppress(Stopped)):
                stack.enter_context(context)
            stack.enter_context(trainer.precision_plugin.train_step_context())
            module.training_step(_own_copy(batch), *((0,) if takes_number else ()))
    finally:
        capture.remove()
        del strategy["backward"]
        strategy.update(replaced)
    return capture


def _own_copy(batch: Any) -> Any:
    """A copy, as the step may change its batch: take something out of a dict, or scale a tensor in place."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # tensors of a graph, iterators, locks, and whatever somebody's own class says
        return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, batch)


def networks_in(module: nn.Module, kinds: Sequence[type[nn.Module]] = (_ConvNd,)) -> list[str]:
    """The names of the module and of those submodules that hold a convolution, without the convolutions themselves.

    Args:
        module: The module.
        kinds: What is looked for instead, where there is none of the first, of the second, and so on.
    """
    for kind in kinds:
        holders = [
            name
            for name, part in module.named_modules()
            if name.rpartition(".")[2] != COMPILED
            and not isinstance(part, kind)
            and any(isinstance(m, kind) for m in part.modules())
        ]
        if holders:
            return holders
    return []


def find_network(module: nn.Module, name: str) -> nn.Module:
    """The submodule of this name, out of its compiled wrapper if it has one.

    Raises:
        MisconfigurationException: If there is none.
    """
    modules = dict(module.named_modules())
    if name not in modules:
        raise MisconfigurationException(
            f"{type(module).__name__} has no submodule {name!r}. {did_you_mean(name, filter(None, modules))}"
        )
    found = getattr(modules[name], COMPILED, None)
    return found if isinstance(found, nn.Module) else modules[name]


def as_inputs(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """The arguments of a call, by position if all are, else all by name.

    Raises:
        MisconfigurationException: For arguments that have no name (``*args``) beside such that have no position.
    """
    if not kwargs:
        return args
    if not args:
        return dict(kwargs)
    inner = getattr(network, COMPILED, network)
    bound = inspect.signature(inner.forward).bind(*args, **kwargs)
    if not bound.kwargs:
        return bound.args
    kinds = inspect.signature(inner.forward).parameters
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = kinds[name].kind
        if kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            raise MisconfigurationException(
                f"{type(network).__name__} is called with {name!r} by position only, and with {', '.join(bound.kwargs)}"
                " by name: such a call cannot be kept. Name a part of it with module=..."
            )
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def call_network(network: nn.Module, inputs: Inputs) -> Any:
    """Calls ``network`` with what a :class:`Capture` took, brought to its device."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    moved: Any = mapped(inputs, lambda tensor: tensor.to(device))
    return network(**moved) if isinstance(moved, dict) else network(*moved)


def first_samples(inputs: Inputs, number: int) -> Inputs:
    """The first samples of a batch: of each tensor that is as long as the first one in it."""
    size = batch_size(inputs)
    return mapped(inputs, lambda t: t[:number].clone() if t.ndim and len(t) == size else t)


def batch_size(inputs: Any) -> int:
    """The length of the first tensor that has one, 0 without any."""
    return next((len(t) for t in _tensors(inputs) if t.ndim), 0)


def size_in_bytes(inputs: Any) -> int:
    """What the tensors in a structure take."""
    return sum(t.numel() * t.element_size() for t in _tensors(inputs))


class Sample:
    """Inputs of the network from the first training batches, gathered from all ranks, the same on each.

    It is what BatchNorm's statistics are estimated from. The loaders are left alone: to iterate one once more would
    draw random numbers, wake workers, and move loaders that can resume. Kept in checkpoints, as a resumed run could
    not have it otherwise.

    Args:
        samples: How many to keep, over all ranks.
        megabytes: And how much memory at most; two samples a rank are kept whatever they take.
    """

    def __init__(self, samples: int, megabytes: float) -> None:
        self.samples = samples
        self.megabytes = megabytes
        self.clear()

    def clear(self) -> None:
        """Forgets all, to begin anew."""
        self.batches: list[Inputs] = []
        self.full = False
        self._mine: list[Inputs] = []
        self._enough = False

    def add(self, trainer: pl.Trainer, inputs: Inputs | None) -> None:
        """Adds what the ranks were given in this batch. All ranks call it in the same batches."""
        mine = None if inputs is None else self._part(self.batches, 1, inputs, trainer.world_size)
        new = [batch for batch in gather_objects(trainer, mine) if batch is not None]
        self.batches += new
        enough = sum(batch_size(batch) for batch in self.batches) >= self.samples
        self.full = enough or bool(self.batches and not new)

    def note(self, trainer: pl.Trainer, inputs: Inputs | None) -> None:
        """Notes what this rank was given, for :meth:`add_noted`: other ranks may have fewer batches, or none."""
        if inputs is not None and not self._enough:
            part = self._part(self._mine, trainer.world_size, inputs, trainer.world_size)
            self._mine += [] if part is None else [part]
            noted = trainer.world_size * sum(batch_size(batch) for batch in self._mine)
            self._enough = part is None or noted >= self.samples

    def add_noted(self, trainer: pl.Trainer) -> None:
        """Adds what the ranks have noted, batch by batch. All ranks call it."""
        noted = gather_objects(trainer, (self._mine, self._enough))
        rounds = zip_longest(*(batches for batches, _ in noted))
        self.batches += [batch for batches in rounds for batch in batches if batch is not None]
        enough = sum(batch_size(batch) for batch in self.batches) >= self.samples
        self.full = enough or (bool(self.batches) and all(enough for _, enough in noted))
        self._mine, self._enough = [], False

    def _part(self, held: list[Inputs], ranks: int, inputs: Inputs, world_size: int) -> Inputs | None:
        """What is to be kept of a rank's batch, where ``ranks`` hold each as much as ``held``."""
        have = ranks * sum(batch_size(batch) for batch in held)
        each = max(1.0, size_in_bytes(inputs) / max(1, batch_size(inputs)))
        room = int((self.megabytes * 2**20 - ranks * size_in_bytes(held)) / each)
        if not held:
            room = max(2 * world_size, room)
        wanted = -(-min(self.samples - have, room) // world_size)
        return first_samples(inputs, wanted) if wanted > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"batches": list(self.batches), "full": self.full}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.batches, self.full = list(state["batches"]), bool(state["full"])


def is_validation_of_fit(trainer: pl.Trainer) -> bool:
    """Whether a validation of fit is running, whose batches an uninterrupted run would have seen as well.

    The sanity check of a resumed run is none.
    """
    resumed = trainer.sanity_checking and trainer.global_step > 0
    return trainer.state.fn == TrainerFn.FITTING and not resumed


def _copied(inputs: Inputs, dtype: torch.dtype | None) -> Inputs:
    """On the CPU, apart from the graph; autocast's half precision as the network's own parameters have it."""

    def copy(tensor: Tensor) -> Tensor:
        with torch.inference_mode(False):  # what is cloned in inference mode can never be trained on
            tensor = tensor.detach().to("cpu", copy=True)
            return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    return mapped(inputs, copy)


def _dtype(network: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), None)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with its tensors changed; only what a checkpoint can hold as plain data."""
    if isinstance(value, Tensor):
        return change(value.as_subclass(Tensor))
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [mapped(part, change) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    raise MisconfigurationException(
        f"The network is called with a {type(value).__name__}, which cannot be kept in a checkpoint. Name a part of it"
        " that takes tensors, with module=..."
    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
