"""A network in another shape: tensors cut in place, optimizer state with them, other shapes taken from checkpoints.

Parameters keep their identity (``p.data`` is exchanged), so optimizers, schedulers, hooks and tied weights stay valid;
a DistributedDataParallel around the network does not, and has to be made anew. The shapes of the tensors are the truth;
numbers such as ``out_channels`` follow them, so that a ``state_dict`` alone is enough to rebuild a network.

Pure functions on torch objects.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tips.core.layer_numbers import follow_shapes
from lightning_tips.core.spectral_norms import settle_spectral_norms

Kept = Mapping[str, Sequence["Sequence[int] | None"]]
"""What stays of each tensor, by its name in the ``state_dict``: for each dimension the indices, in ascending order, or
``None`` for all. Tensors that stay whole are left out; of tied ones any name will do. Plain data, to be broadcast."""


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "hardswish": F.hardswish,
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
}
"""What may be left of a removed block, by name: the activation after its addition."""


class RemovedBlock(nn.Module):
    """Stands where a block has been taken out of a network, and passes its first input on.

    A buffer ``removed`` marks the place in every ``state_dict``, also in files of weights alone. It holds the name of
    the activation, as bytes: with it the state says by itself what stands there.

    Args:
        block: What stood there. Its shapes are remembered, without memory for its values, so that a checkpoint of the
            whole network can be loaded again.
        activation: What is done to the input: a name in :data:`ACTIVATIONS`; a dot and the name of a submodule of
            ``block`` without parameters, which is kept for it; or nothing.

    Raises:
        ValueError: If there is no such activation.
    """

    removed: Tensor

    def __init__(self, block: nn.Module, activation: str = "") -> None:
        super().__init__()
        # Weights that a hook computes (the old weight_norm) are no leaves, which deepcopy refuses.
        computed = [v for m in block.modules() for v in vars(m).values() if isinstance(v, Tensor) and v.grad_fn]
        former = copy.deepcopy(block, {id(value): value.detach().clone() for value in computed})
        self._passing = {  # not in any state_dict, so that nothing else could bring them back
            name: buffer
            for module_name, module in former.named_modules()
            for name, buffer in module.named_buffers(module_name, recurse=False)
            if name.rpartition(".")[2] in module._non_persistent_buffers_set
        }
        self._former = (former.to("meta"),)  # in a tuple, so that it is no submodule
        self.register_buffer("removed", torch.empty(0, dtype=torch.uint8, device=_device(block)))
        self._activate(activation)
        self.train(block.training)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Returns ``x``, after the activation if there is one."""
        return x if self._function is None else self._function[0](x)

    def restored(self) -> nn.Module:
        """The block that stood here, on the device of the marker; what a ``state_dict`` holds is uninitialised."""
        block = copy.deepcopy(self._former[0]).to_empty(device=self.removed.device).train(self.training)
        buffers = dict(block.named_buffers())
        for name, value in self._passing.items():
            buffers[name].copy_(value)
        return block

    @property
    def activation(self) -> str:
        """Its name, empty without one."""
        return activation_of(self.removed)

    def _activate(self, name: str) -> None:
        self._function: tuple[Callable[[Tensor], Tensor]] | None = None
        if name.startswith("."):
            function = copy.deepcopy(dict(self._former[0].named_modules()).get(name[1:]))
            if function is None or any(True for _ in function.parameters()):
                raise ValueError(f"The block has no submodule {name[1:]!r} without parameters to keep as activation.")
            if getattr(function, "inplace", False):
                function.inplace = False  # the input belongs to others
            self._function = (function,)
        elif name:
            if name not in ACTIVATIONS:
                raise ValueError(f"There is no activation {name!r} to keep. Known: {', '.join(ACTIVATIONS)}.")
            self._function = (ACTIVATIONS[name],)
        self.removed = torch.tensor(list(name.encode()), dtype=torch.uint8, device=self.removed.device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        marker = state_dict.get(f"{prefix}removed")
        if marker is not None and activation_of(marker) != self.activation:
            self._activate(activation_of(marker))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def activation_of(marker: Tensor) -> str:
    """The activation that the marker of a :class:`RemovedBlock` names."""
    return bytes(marker.to(torch.uint8).tolist()).decode()


def keep_indices(module: nn.Module, kept: Kept, optimizers: Iterable[Optimizer] = ()) -> None:
    """Cuts tensors down to the indices in ``kept``, in place, with their gradients and optimizer state.

    Args:
        module: The network.
        kept: What stays; nothing is changed unless all of it fits.
        optimizers: Those that hold the parameters. State of a parameter's own shape is cut like the parameter, so that
            momentum survives; a factored state (Adafactor's rows and columns) along the dimensions that it has.

    Raises:
        KeyError: If there is no tensor of a name.
        ValueError: If an index does not fit, or an optimizer keeps state of a shape that cannot be cut.
    """
    tensors = named_tensors(module)
    chosen = {name: _as_indices(name, tensors, dims) for name, dims in kept.items()}
    by_parameter = {id(tensors[name]): indices for name, indices in chosen.items()}
    cuts: list[tuple[dict[str, Any], str, list[Tensor | None]]] = []
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if id(parameter) in by_parameter:
                cuts += _state_cuts(optimizer, parameter, state, by_parameter[id(parameter)])
    with torch.inference_mode(False), torch.no_grad():  # what inference mode makes could not be trained
        for state, key, indices in cuts:
            state[key] = _take(state[key], indices)
        done: set[int] = set()
        for name, indices in chosen.items():
            tensor = tensors[name]
            if id(tensor) not in done:  # tied ones come under several names
                done.add(id(tensor))
                gradient = tensor.grad
                tensor.grad = None
                _exchange(tensor, _take(tensor.data, indices))
                if gradient is not None:
                    tensor.grad = _take(gradient, indices)
        settle_spectral_norms(module, done)
    follow_shapes(module)


def resize_to(module: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Gives ``module`` the shapes of ``state_dict``, larger or smaller, in place, before that is loaded.

    Blocks that are marked as removed there are taken out, and those that are not are put back. The values of what
    changed its shape are undefined until the state is loaded.

    Args:
        module: The network.
        state_dict: Tensors by name, of a network of the same kind.
        prefix: What the names in ``state_dict`` begin with.

    Returns:
        The names of the tensors and blocks that changed, without the prefix.
    """
    changed = _exchange_blocks(module, state_dict, prefix)
    with torch.no_grad():
        for name, tensor in named_tensors(module).items():
            incoming = state_dict.get(prefix + name)
            if isinstance(incoming, Tensor) and incoming.shape != tensor.shape and incoming.ndim == tensor.ndim:
                tensor.grad = None
                _exchange(tensor, tensor.data.new_empty(incoming.shape))
                changed.append(name)
    if changed:
        follow_shapes(module)
    return changed


def accept_other_shapes(module: nn.Module) -> RemovableHandle:
    """Lets ``module.load_state_dict`` take pruned and unpruned states alike, by :func:`resize_to`.

    Only for tensors whose number of dimensions agrees; anything else fails as it would have.

    Returns:
        The hook's handle; its ``remove()`` takes the change back.
    """

    def fit_shapes(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        resize_to(module, state_dict, prefix)

    return module.register_load_state_dict_pre_hook(fit_shapes)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by their names, tied ones under each of their names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _as_indices(name: str, tensors: Mapping[str, Tensor], dims: Sequence[Sequence[int] | None]) -> list[Tensor | None]:
    tensor = tensors[name]
    if len(dims) != tensor.ndim:
        raise ValueError(f"{name} has {tensor.ndim} dimensions, and indices are given for {len(dims)}.")
    for size, indices in zip(tensor.shape, dims, strict=True):
        if indices is not None and (not len(indices) or min(indices) < 0 or max(indices) >= size):
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} has no indices {list(indices)[:8]}.")
    return [None if d is None else torch.as_tensor(list(d), device=tensor.device) for d in dims]


def _exchange(tensor: Tensor, data: Tensor) -> None:
    """Gives ``tensor`` other data, of another shape.

    Autograd keeps the shape of a leaf as long as anybody holds on to its place in a graph (a compiled module does), and
    forgets it when the dtype changes, but not when the shape does.
    """
    if tensor.is_floating_point():
        other = torch.float16 if data.dtype != torch.float16 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data


def _take(tensor: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    plain = tensor.is_contiguous()  # a 1x1 kernel is both
    for dim, kept in enumerate(indices):
        if kept is not None:
            tensor = tensor.index_select(dim, kept.to(tensor.device))
    if channels_last and not plain:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


def _state_cuts(
    optimizer: Optimizer, parameter: Tensor, state: dict[str, Any], indices: list[Tensor | None]
) -> list[tuple[dict[str, Any], str, list[Tensor | None]]]:
    cuts = []
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.numel() <= 1:
            continue
        sizes = list(zip(value.shape, parameter.shape, strict=False))
        if value.ndim != parameter.ndim or any(has not in (1, full) for has, full in sizes):
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape"
                f" {tuple(parameter.shape)}, which cannot be cut with it. Use an optimizer with state of the"
                " parameter's shape (SGD, Adam, AdamW, RMSprop, ...)."
            )
        cuts.append((state, key, [i if has == full else None for (has, full), i in zip(sizes, indices, strict=True)]))
    return cuts


def _exchange_blocks(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    changed = []
    for name, block in list(module.named_modules()):
        marked = f"{prefix}{name}.removed" in state_dict
        if not name or marked == isinstance(block, RemovedBlock):
            continue
        parent, _, attribute = name.rpartition(".")
        new = (
            block.restored()
            if isinstance(block, RemovedBlock)
            else _removed(block, state_dict[f"{prefix}{name}.removed"])
        )
        setattr(module.get_submodule(parent), attribute, new)
        changed.append(name)
    return changed


def _removed(block: nn.Module, marker: Tensor) -> RemovedBlock:
    return RemovedBlock(block, activation_of(marker)).to(_device(block))


def _device(module: nn.Module) -> torch.device:
    tensor = next(iter([*module.parameters(), *module.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device
