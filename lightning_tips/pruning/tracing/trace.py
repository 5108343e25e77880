"""A forward pass that carries labels: which channel of which layer each entry of each activation belongs to.

Rules exist for layers (``layer_rules.py``) and for operations (``operations.py``).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tips.pruning.networks.limits import check_limits
from lightning_tips.pruning.tracing import labels as lb
from lightning_tips.pruning.tracing import layer_rules
from lightning_tips.pruning.tracing.links import Links
from lightning_tips.pruning.tracing.operations import OperationRules, tensors_in

__all__ = ["ChannelTrace", "tensors_in"]

LAYERS = (_ConvNd, nn.Linear, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU)


class ChannelTrace(OperationRules, TorchDispatchMode):
    """Follows the channels through everything that runs inside it. Several passes add to the same links.

    Args:
        model: A copy of the network; it gets hooks, and its tensors attributes.
        links: Where to put what is found.
        deadline: ``time.monotonic()`` at which to stop.
    """

    def __init__(self, model: nn.Module, links: Links, deadline: float) -> None:
        super().__init__()
        self.links = links
        self.deadline = deadline
        self.names: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.names.setdefault(id(tensor), name)
        self.layer_names = {id(layer): name for name, layer in model.named_modules()}
        self.positions: dict[str, float] = {}
        self.seen: set[str] = set()
        self.count_positions = True
        self._keep_alive = model
        self._inside = 0
        self._labels_in: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> ChannelTrace:
        for layer in self._keep_alive.modules():
            if isinstance(layer, LAYERS):
                # Before hooks that compute weights, so that these are not looked into.
                self._handles.append(layer.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
                self._handles.append(layer.register_forward_hook(self._leave))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inside = 0
        self._labels_in.clear()

    def fix_outputs(self, outputs: Any) -> None:
        """Says that what comes out of the network keeps its shape."""
        for tensor in tensors_in(outputs):
            self.links.fix(lb.thin(self.of(tensor)), "feeds the output of the network")

    def of(self, tensor: Tensor) -> Tensor:
        """The labels of a tensor."""
        held = getattr(tensor, "_channel_labels", None)
        if held is not None and held.shape == tensor.shape:
            return held
        name = self.names.get(id(tensor))
        if name is not None and tensor.is_floating_point() and 1 < tensor.numel() <= 2**21:
            return lb.compact(self.links.vector((name, -1), *tensor.shape))
        return lb.none(tensor.shape)

    def put(self, tensor: Tensor, labels: Tensor) -> None:
        """Sets the labels of a tensor."""
        tensor._channel_labels = labels  # type: ignore[attr-defined]

    def is_parameter(self, tensor: Any) -> bool:
        """Whether it is a parameter or buffer of the network itself."""
        return id(tensor) in self.names

    # Layers

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._check_time()
        self._inside += 1
        if self._inside == 1:
            with without_modes():
                self._labels_in = [self.of(tensor) for tensor in tensors_in((args, kwargs))]

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._inside == 1:
            name = self.layer_names[id(layer)]
            self.seen.add(name)
            tensor = output if isinstance(output, Tensor) else None
            if len(self._labels_in) == 1 and tensor is not None:
                if self.count_positions and isinstance(layer, (_ConvNd, nn.Linear)):
                    self.positions[name] = self.positions.get(name, 0) + layer_rules.positions(layer, args, tensor)
                with torch.no_grad(), without_modes():
                    self.put(tensor, layer_rules.apply(self, layer, name, self._labels_in[0], tensor))
            else:
                for labels in self._labels_in:
                    self.links.fix(lb.thin(labels), f"goes through {name}")
                layer_rules.fix_layer(self, layer, name, f"{name} takes or gives more than one tensor")
        self._inside -= 1

    # Operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._check_time()
        if self._inside:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        with without_modes():
            before = [self.of(tensor) for tensor in given]
        output = func(*args, **kwargs)
        results = tensors_in(output)
        if not results or not any(tensor.is_floating_point() for tensor in given):
            return output
        with without_modes():
            if any(lb.any_channel(labels) for labels in before):
                name = func.overloadpacket.__name__
                rule = self.rule_of(func, name)
                rule(func, name, args, kwargs, given, before, results)
        return output

    def _check_time(self) -> None:
        check_limits(self.deadline, "the network was analysed")


def without_modes() -> AbstractContextManager[Any]:
    """While it is open, no ``TorchDispatchMode`` sees what runs.

    Labels are computed in the middle of a forward pass that such modes watch. These would see nothing in them that they
    look for, but each operation would take many times longer.
    """
    return _python_dispatch._disable_current_modes()
