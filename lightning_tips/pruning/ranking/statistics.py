"""What a network does with data, channel by channel, without leaving a trace in it.

A forward pass is watched through module hooks and a ``TorchFunctionMode``: the output of a layer is followed through
its BatchNorm to its nonlinearity, be they modules or functional calls, without a graph of the network.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_tips.pruning.networks.layers import channel_dim_of
from lightning_tips.pruning.networks.runs import Forward, default_forward, device_of, moved, untouched

RECTIFIERS = frozenset({"relu", "relu_", "relu6", "_threshold", "threshold_", "clamp_min", "clamp_min_"})
NONLINEARITIES = RECTIFIERS | {
    *("celu", "celu_", "elu", "elu_", "gelu", "hardsigmoid", "hardswish", "hardtanh", "hardtanh_", "leaky_relu"),
    *("leaky_relu_", "logsigmoid", "mish", "prelu", "rrelu", "rrelu_", "selu", "selu_", "sigmoid", "sigmoid_", "silu"),
    *("softplus", "softsign", "tanh", "tanh_"),
}
# What changes no channel's place. Anything else ends the way of a layer's output: above all the sum with a shortcut,
# after which the values are no longer the layer's alone.
_NORMS = frozenset({"batch_norm", "instance_norm", "group_norm"})
_PASSED = frozenset(
    {
        *("contiguous", "to", "float", "half", "bfloat16", "clone", "type", "type_as", "interpolate"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
        *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for n in (1, 2, 3)),
    }
)

_PRODUCTS = frozenset({"mul", "mul_", "multiply", "__mul__", "__imul__", "__rmul__"})

Stage = Literal["output", "norm", "activation"]


@dataclass
class Following:
    """What comes after a layer.

    Args:
        norm: Name of the BatchNorm, if any.
        activation: Name of the function that is its nonlinearity, such as ``relu``, if any.
        rectifier: Whether that function gives exact zeros, as a ReLU does.
        calls: How often the layer ran.
    """

    norm: str | None = None
    activation: str | None = None
    rectifier: bool = False
    calls: int = 0


@dataclass
class _Way:
    """The way of one output of one layer: shared by all tensors that it becomes."""

    layer: str
    channel_dim: int  # from the end, so that it holds with and without a batch dimension
    value: Tensor | None = None
    stage: Stage = "output"
    activated: bool = False


class ChannelWatch(TorchFunctionMode):
    """Follows the outputs of layers while it is open, and sums a statistic of each of their channels.

    The statistic is taken after the first nonlinearity on the way of a layer's output; where none comes, of the last
    value that is the layer's own (after its BatchNorm, before a sum with a shortcut).

    Args:
        model: The network; hooks are put on it and removed again.
        layers: Names of the convolutions and linear layers to follow.
        statistic: From values to what is summed over everything but the channels. Without it the ways alone are found.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], statistic: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.model, self.layers, self.statistic = model, layers, statistic
        self.following: dict[str, Following] = {}
        self.sums: dict[str, Tensor] = {}  # (channels,) float64
        self.counts: dict[str, int] = {}  # values of each channel
        self._ways: dict[int, tuple[weakref.ref[Tensor], _Way, Stage]] = {}
        self._stack = ExitStack()
        self._open: list[tuple[_Way, int]] = []

    def __enter__(self) -> ChannelWatch:
        wanted = set(self.layers)
        for name, module in self.model.named_modules(remove_duplicate=False):
            if name in wanted:
                self.following.setdefault(name, Following())
                self._hook(module, self._starts(name, channel_dim_of(module)))
            elif isinstance(module, _BatchNorm):
                self._hook(module, self._normalised(name))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()
        self.end_of_pass()

    def _hook(self, module: nn.Module, hook: Callable[..., None]) -> None:
        self._stack.callback(module.register_forward_hook(hook).remove)

    def end_of_pass(self) -> None:
        """Adds what was seen since the last call to the sums. Until then a later stage takes an earlier one's place."""
        for way, count in self._open:
            if way.value is not None:
                known = self.sums.get(way.layer)
                self.sums[way.layer] = way.value if known is None else known + way.value
                self.counts[way.layer] = self.counts.get(way.layer, 0) + count
        self._open.clear()
        self._ways.clear()

    def _starts(self, name: str, channel_dim: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.following[name].calls += 1
                self._reach(output, _Way(name, channel_dim), "output")

        return hook

    def _normalised(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            known = self._way(inputs[0]) if inputs else None
            if known is None or known[1] != "output":
                return
            way = known[0]
            self.following[way.layer].norm = name
            # A SyncBatchNorm's own autograd function is not seen from here.
            if isinstance(output, Tensor) and self._way(output) is None:
                self._reach(output, way, "norm")

        return hook

    def _way(self, tensor: Any) -> tuple[_Way, Stage] | None:
        known = self._ways.get(id(tensor))
        return known[1:] if known is not None and known[0]() is tensor else None

    def _of_the_same(self, way: _Way, args: tuple[Any, ...]) -> bool:
        known = self._way(args[1]) if len(args) > 1 else None
        return known is not None and known[0] is way and way.activated

    def _reach(self, tensor: Tensor, way: _Way, stage: Stage, again: bool = False) -> None:
        self._ways[id(tensor)] = (weakref.ref(tensor), way, stage)
        way.activated |= stage == "activation"
        if self.statistic is None:
            return
        if stage == "output":
            self._open.append((way, tensor.numel() // tensor.shape[way.channel_dim]))
        elif way.stage == "activation" and not again:
            return  # the first nonlinearity counts, should the output go two ways
        way.stage = stage
        dims = [d for d in range(tensor.ndim) if d != tensor.ndim + way.channel_dim]
        values = self.statistic(tensor.detach())
        # float32 is what all devices add up; what is added up over batches is double where there is such a thing.
        total = values.sum(dims, dtype=torch.float32) if dims else values.float()
        way.value = total if total.device.type == "mps" else total.double()
        if stage != "output":
            self._open = [(w, values.numel() // len(total) if w is way else n) for w, n in self._open]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs ``func`` and notes where the outputs of layers go."""
        kwargs = kwargs or {}
        source = args[0] if args else kwargs.get("input")
        known = self._way(source) if isinstance(source, Tensor) else None
        output = func(*args, **kwargs)
        if known is None or not isinstance(output, Tensor):
            return output
        way, stage = known
        name = _told_by_arguments(getattr(func, "__name__", ""), args, kwargs)
        if name in _PRODUCTS and self._of_the_same(way, args):
            # x * sigmoid(x): a nonlinearity written down in two steps.
            following = self.following[way.layer]
            following.activation, following.rectifier = f"product with {following.activation}", False
            self._reach(output, way, "activation", again=True)
        elif stage == "activation":
            if output is source:
                del self._ways[id(source)]
        elif name in NONLINEARITIES:
            following = self.following[way.layer]
            if following.activation is None:
                following.activation, following.rectifier = name.rstrip("_"), name in RECTIFIERS
            self._reach(output, way, "activation")
        elif name in _NORMS:
            self._reach(output, way, "norm")
        elif name in _PASSED:
            self._ways[id(output)] = (weakref.ref(output), way, stage)
        elif output is source:  # changed in place into something that is not the layer's alone
            del self._ways[id(source)]
        return output


def _told_by_arguments(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """ReLUs by other names, clamp(x, 0) and hardtanh(x, 0, 6), which nn.ReLU6 calls; and those that only look alike."""

    def argument(position: int, *keywords: str) -> Any:
        named = [kwargs[keyword] for keyword in keywords if keyword in kwargs]
        return args[position] if len(args) > position else (named or [None])[0]

    plain = name.rstrip("_")
    if plain in ("clamp", "clamp_min"):
        return "clamp_min" if argument(1, "min") == 0 else name.replace("_min", "")
    if plain == "hardtanh" and argument(1, "min_val") == 0:
        return "relu6"
    if plain.endswith("threshold") and (argument(1, "threshold"), argument(2, "value")) != (0, 0):
        return "other threshold"
    return name


def watch(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Any],
    forward: Forward | None = None,
    statistic: Callable[[Tensor], Tensor] | None = None,
    limit: int | None = None,
) -> ChannelWatch:
    """Runs the model on (``limit``) batches in eval mode and follows ``layers``; see :class:`ChannelWatch`."""
    forward = forward or default_forward
    device = device_of(model)
    seen = ChannelWatch(model, layers, statistic)
    with untouched(model):
        for number, batch in enumerate(batches, 1):
            batch = moved(batch, device)
            with seen:
                forward(model, batch)
            if number == limit:
                break
    return seen
