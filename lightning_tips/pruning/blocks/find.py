"""Residual blocks that can be taken out of a network: found by what they compute, not by what they are called.

A block is ``activation(x + f(x))`` with an output of its input's shape. Without its branch ``f`` it is the activation
alone, or nothing at all where its inputs do not change under it (a ReLU after a ReLU). That is tried out: on a copy all
weights are set to zero, and a block is what then still passes its input on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_tips.core.resize import ACTIVATIONS, RemovedBlock
from lightning_tips.pruning.networks.copies import (
    copy_network,
    nothing_remembered,
    plain_attention,
    prepare_inputs,
    repeated,
)
from lightning_tips.pruning.networks.runs import Forward, call
from lightning_tips.pruning.tracing.trace import tensors_in


@dataclass(frozen=True)
class Block:
    """A residual block.

    Args:
        name: Of the module.
        kind: Name of its class.
        shape: Of its input, without the batch.
        activation: What stays in its place, as :class:`~lightning_tips.core.RemovedBlock` takes it; "" for nothing.
        reason: Why it cannot be taken out; empty where it can.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    activation: str = ""
    reason: str = ""

    @property
    def removable(self) -> bool:
        """Whether it can be taken out."""
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "shape": list(self.shape)}


def find_blocks(
    model: nn.Module, example_inputs: Any, *, protect: Sequence[str] = (), forward: Forward | None = None
) -> list[Block]:
    """The residual blocks of a network, in the order in which they run.

    Of blocks in blocks the innermost ones are meant. Blocks of the same classes that change the shape, or whose
    shortcut has weights, are listed with the reason why they stay; so are those that are shared, that run more than
    once, or that the network cannot do without for another reason, which is tried: forward in eval and in train mode,
    shapes of the outputs, backward.

    Args:
        model: The network; it stays as it is.
        example_inputs: A tensor, a tuple or list of arguments or a dict of them, with the batch dimension. Real inputs
            are best: whether an activation has to stay is seen on them.
        protect: Names or patterns (``"stages.0.*"``) of blocks that are to stay.
        forward: ``forward(model, example_inputs)``, where calling the model is not enough.

    Returns:
        Blocks, removable or not; empty for a network without any.

    Raises:
        ValueError: If the network cannot be copied, or fails on the inputs.
    """
    run = forward or call
    twin = copy_network(model)
    inputs, _ = prepare_inputs(twin, example_inputs, samples=2)
    with nothing_remembered(), plain_attention():
        calls = _record(twin.eval(), inputs, run)
        with torch.no_grad():
            _silence(twin)
            activations = _residual(twin, calls)
    blocks = [
        Block(name, c.kind, c.shape, activations[name], _obstacle(model, name, c, protect))
        if name in activations
        else Block(name, c.kind, c.shape, "", c.difference)
        for name, c in calls.items()
        if name in activations or _is_sibling(name, calls, activations)
    ]
    return _tried(copy_network(model), inputs, run, blocks)


def put_in_place(model: nn.Module, blocks: Mapping[str, str]) -> dict[str, nn.Module]:
    """Takes blocks out of a network, in place; optimizers are not looked at.

    Args:
        model: The network.
        blocks: By name, the activation that stays; see :class:`Block`.

    Returns:
        The blocks, by name.

    Raises:
        AttributeError: If there is no module of a name; nothing is changed then.
        ValueError: If an activation is unknown; likewise.
    """
    out = {name: model.get_submodule(name) for name in blocks}
    new = {}
    for name, activation in blocks.items():
        device = next((t.device for t in [*out[name].parameters(), *out[name].buffers()]), torch.device("cpu"))
        new[name] = RemovedBlock(out[name], activation).to(device)
    for name, replacement in new.items():
        set_module(model, name, replacement)
    return out


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of another."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


@contextmanager
def without(model: nn.Module, blocks: Mapping[str, str]) -> Iterator[nn.Module]:
    """While it is open, ``blocks`` (name: activation) are out of ``model``."""
    out = put_in_place(model, blocks)
    try:
        yield model
    finally:
        for name, module in out.items():
            set_module(model, name, module)


def try_without(twin: nn.Module, inputs: Any, run: Forward, blocks: Mapping[str, str]) -> str:
    """What goes wrong without some blocks, empty if nothing does.

    Args:
        twin: A copy of the network, whose gradients, statistics and modes may change; the blocks are put back.
        inputs: Example inputs, on its device.
        run: Runs it.
        blocks: Name and activation of each.
    """
    for training in (False, True):
        twin.train(training)
        batch = repeated(inputs) if training else inputs
        with torch.set_grad_enabled(training):
            expected = [tuple(tensor.shape) for tensor in tensors_in(run(twin, batch))]
            try:
                with without(twin, blocks):
                    outputs = tensors_in(run(twin, batch))
                    if [tuple(tensor.shape) for tensor in outputs] != expected:
                        return "the network's outputs have another shape without it"
                    if not all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point()):
                        return "the network's outputs are not finite without it"
                    if training:
                        _backward(twin, outputs)
            except Exception as error:  # of whatever kind: somebody else's network
                first = str(error).splitlines()[0] if str(error) else ""
                return f"the network fails without it: {type(error).__name__}: {first}"
    return ""


def _backward(twin: nn.Module, outputs: Sequence[Tensor]) -> None:
    sums = [tensor.float().mean() for tensor in outputs if tensor.requires_grad]
    if sums:
        torch.stack([s.to(sums[0].device) for s in sums]).sum().backward()
    twin.zero_grad(set_to_none=True)


@dataclass
class _Call:
    """How a module was called in one pass."""

    kind: str
    shape: tuple[int, ...] = ()
    times: int = 0
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # where the output has the input's shape
    by_keyword: bool = False
    difference: str = ""


def _record(twin: nn.Module, inputs: Any, run: Forward) -> dict[str, _Call]:
    calls: dict[str, _Call] = {}
    held: dict[str, list[Tensor | None]] = {}
    handles = []
    for name, module in twin.named_modules():
        # A layer of torch's own is no block, and neither is what has no matrix or kernel to compute a branch with.
        leaf = type(module).__module__.startswith("torch.nn") and not list(module.children())
        if not name or leaf or not any(p.ndim >= 2 for p in module.parameters()):
            continue

        def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            # Cloned, as a block may work on its input in place.
            held.setdefault(name, []).append(first.detach().clone() if isinstance(first, Tensor) else None)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            entry = calls.setdefault(name, _Call(type(module).__name__))
            entry.times += 1
            x = held[name].pop()
            if entry.times > 1 or x is None or not isinstance(output, Tensor) or not x.is_floating_point():
                return
            entry.shape, entry.by_keyword = tuple(x.shape[1:]), not args
            if x.shape == output.shape:
                rest = {k: v for k, v in kwargs.items() if args or v is not next(iter(kwargs.values()))}
                entry.inputs = ((x, *args[1:]), rest)
                entry.difference = "its shortcut is not the identity"
            else:
                entry.difference = f"it changes the shape from {entry.shape} to {tuple(output.shape[1:])}"

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    order = {name: i for i, (name, _) in enumerate(twin.named_modules())}
    try:
        with torch.no_grad():
            run(twin, inputs)
    except Exception as error:
        raise ValueError(f"The network fails on the example inputs: {type(error).__name__}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return dict(sorted(calls.items(), key=lambda item: order[item[0]]))


def _silence(twin: nn.Module) -> None:
    """Weights, biases and running means to zero, so that every branch gives zero."""
    for name, parameter in twin.named_parameters():
        # The direction in weight normalisation is divided by its length; the length is what is set to zero there.
        if parameter.is_floating_point() and not name.endswith(("weight_v", "original1")):
            parameter.zero_()
    for module in twin.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.zero_()
            module.running_var.fill_(1)


def _residual(twin: nn.Module, calls: Mapping[str, _Call]) -> dict[str, str]:
    """Which modules pass their input on without their weights, with the activation that stays. Innermost ones only."""
    found: dict[str, str] = {}
    for name in sorted(calls, key=lambda name: -name.count(".")):
        entry = calls[name]
        if entry.inputs is None or any(inner.startswith(f"{name}.") for inner in found):
            continue
        (x, *args), kwargs = entry.inputs
        block = twin.get_submodule(name)
        # Of both signs, and large enough for every activation to show.
        probe = 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
        passed = _passed(block, probe, args, kwargs, entry.by_keyword)
        if passed is None:
            continue
        activation = _activation(block, probe, passed)
        if activation is None:
            continue
        if activation and _same(_passed(block, x, args, kwargs, entry.by_keyword), x):
            activation = ""  # on real inputs it does nothing, as after a ReLU
        found[name] = activation
    return found


def _passed(block: nn.Module, x: Tensor, args: Sequence[Any], kwargs: dict[str, Any], by_keyword: bool) -> Any:
    if by_keyword:
        return None
    try:
        output = block(x.clone(), *args, **kwargs)
    except Exception:  # of whatever kind: it does not take such inputs, so it is not known to be a block
        return None
    return output if isinstance(output, Tensor) and output.shape == x.shape else None


def _activation(block: nn.Module, x: Tensor, passed: Tensor) -> str | None:
    """The activation that makes ``passed`` of ``x``; "" for none, ``None`` where it is something else."""
    if _same(passed, x):
        return ""
    for name, function in ACTIVATIONS.items():
        if _same(passed, function(x)):
            return name
    for name, module in block.named_modules():
        if name and not list(module.children()) and not list(module.parameters()) and _same(passed, _safe(module, x)):
            return f".{name}"
    return None


def _safe(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    try:
        return function(x.clone())
    except Exception:  # of whatever kind: then it is not the activation
        return None


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    tolerance = 1e-2 if one.dtype in (torch.float16, torch.bfloat16) else 1e-5
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()) if len(other) else 0.0)


def _is_sibling(name: str, calls: Mapping[str, _Call], found: Mapping[str, str]) -> bool:
    """Whether it is of the class of a block, without being inside or around one."""
    entry = calls[name]
    if not entry.difference or any(a.startswith(f"{b}.") for f in found for a, b in ((name, f), (f, name))):
        return False
    return any(calls[block].kind == entry.kind for block in found) and entry.kind not in ("Sequential", "ModuleList")


def _obstacle(model: nn.Module, name: str, entry: _Call, protect: Sequence[str]) -> str:
    """Why a block has to stay, as far as its place in the network tells."""
    if any(fnmatch(name, pattern) for pattern in protect):
        return "protected"
    if entry.times > 1:
        return f"it runs {entry.times} times in one pass"
    block = model.get_submodule(name)
    if isinstance(block, torch.jit.ScriptModule):
        return "it is compiled by torch.jit"
    names = [other for other, module in model.named_modules(remove_duplicate=False) if module is block]
    if len(names) > 1:
        return f"it is shared, under the names {', '.join(names)}"
    own = {id(tensor) for tensor in [*block.parameters(), *block.buffers()]}
    for other, module in model.named_modules(remove_duplicate=False):
        if other == name or other.startswith(f"{name}."):
            continue
        for tensor_name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if id(tensor) in own:
                return f"it shares a tensor with {f'{other}.{tensor_name}'.lstrip('.')}"
    return ""


def _tried(twin: nn.Module, inputs: Any, run: Forward, blocks: Sequence[Block]) -> list[Block]:
    """Where the network cannot do without all removable blocks together, each is tried alone."""
    removable = {block.name: block.activation for block in blocks if block.removable}
    with nothing_remembered():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        if not removable or not try_without(twin, inputs, run, removable):
            return list(blocks)
        reasons = {name: try_without(twin, inputs, run, {name: kept}) for name, kept in removable.items()}
    return [replace(block, reason=block.reason or reasons[block.name]) for block in blocks]
