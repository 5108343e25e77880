"""A plan is tried on a copy before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_tips.core.layer_numbers import follow_shapes
from lightning_tips.core.resize import keep_indices, named_tensors
from lightning_tips.pruning.filters.plan import PruningPlan
from lightning_tips.pruning.networks.limits import LimitReached, check_limits
from lightning_tips.pruning.networks.runs import Forward
from lightning_tips.pruning.tracing.graph import ChannelGraph, Group, removed_indices
from lightning_tips.pruning.tracing.operations import tensors_in


class TrialFailed(RuntimeError):
    """The network does not work with the plan.

    Args:
        message: What happens.
        layer: The name of the innermost module in which it happened, if any.
    """

    def __init__(self, message: str, layer: str | None = None) -> None:
        super().__init__(message)
        self.layer = layer


def try_plan(
    twin: nn.Module,
    inputs: Any,
    forward: Forward,
    graph: ChannelGraph,
    plan: PruningPlan,
    units: Sequence[int],
    exact: bool,
    deadline: float,
    backward: bool = True,
) -> None:
    """Carries a plan out on a copy of the network, and looks whether it works.

    In eval mode and in train mode the outputs have to have the shapes that they had. Where nothing is averaged over
    channels, they also have to be those of the whole network with zeros in place of what is removed, so that the right
    channels meet. A backward pass has to run.

    Args:
        twin: A copy of the network; what is cut is put back at the end.
        inputs: Example inputs.
        forward: Runs the network on them.
        graph: The network's graph.
        plan: What to try.
        units: The units that the plan removes.
        exact: Whether the outputs can be compared with those of the whole network.
        deadline: ``time.monotonic()`` at which to stop.
        backward: Whether to try train mode and the backward pass too.

    Raises:
        TrialFailed: If it does not work.
        ValueError: If time is up.
    """
    twin.eval()
    tensors = {id(t): t for t in [*twin.parameters(), *twin.buffers()]}
    held = [(tensor, tensor.data) for tensor in tensors.values()]
    inside: list[str] = []
    handles = [h for name, layer in twin.named_modules() for h in _watch(name, layer, inside, deadline)]
    try:
        keep_indices(twin, plan.kept)
        with torch.no_grad():
            pruned = tensors_in(_run(forward, twin, inputs, inside, "eval mode"))
        _compare_shapes(pruned, graph.outputs["eval"], "eval mode")
        if backward and graph.outputs["train"] is not None:
            twin.train()
            for buffer in twin.buffers():
                buffer.data = buffer.data.clone()  # running statistics move in place
            for parameter in twin.parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            outputs = tensors_in(_run(forward, twin, graph.train_inputs, inside, "train mode"))
            _compare_shapes(outputs, graph.outputs["train"], "train mode")
            sums = [tensor.float().mean() for tensor in outputs if tensor.requires_grad]
            if sums:
                try:
                    torch.stack([s.to(sums[0].device) for s in sums]).sum().backward()
                except (MemoryError, torch.OutOfMemoryError) as error:
                    raise ValueError("The network is untouched: too little memory to try its backward pass.") from error
                except Exception as error:
                    raise TrialFailed(f"the backward pass fails: {error}") from error
        if exact:
            twin.eval()
            _restore(held)
            follow_shapes(twin)
            _mask(twin, graph, units)
            with torch.no_grad():
                masked = tensors_in(_run(forward, twin, inputs, inside, "eval mode"))
            for one, other in zip(pruned, masked, strict=True):
                _compare_values(one, other)
    finally:
        for handle in handles:
            handle.remove()
        for tensor in twin.parameters():
            tensor.grad = None
        _restore(held)
        follow_shapes(twin)


def _restore(held: Sequence[tuple[Tensor, Tensor]]) -> None:
    for tensor, data in held:
        if tensor.data is not data:
            tensor.data = data


def find_offenders(
    groups: Sequence[Group], indices: Sequence[int], attempt: Callable[[Sequence[int]], TrialFailed | None]
) -> dict[int, str]:
    """Which groups break the network, by halving.

    Args:
        groups: All groups.
        indices: Those that together break it.
        attempt: Tries some of them, and returns what went wrong.

    Returns:
        By its index, what goes wrong with a group.
    """
    offenders: dict[int, str] = {}
    good: list[int] = []

    def settle(some: list[int]) -> None:
        problem = attempt([*good, *some])
        if problem is None:
            good.extend(some)
        elif len(some) == 1:
            offenders[some[0]] = str(problem)
        else:
            settle(some[: len(some) // 2])
            settle(some[len(some) // 2 :])

    # Groups of one kind break for one reason, so they stand together.
    settle(sorted(indices, key=lambda index: (repr(groups[index].kind), index)))
    return offenders


def _run(forward: Forward, twin: nn.Module, inputs: Any, inside: list[str], mode: str) -> Any:
    inside.clear()
    torch.manual_seed(0)  # so that what draws random numbers can be compared; they are put back at the end
    try:
        return forward(twin, inputs)
    except (LimitReached, MemoryError, torch.OutOfMemoryError) as error:
        raise ValueError(
            f"The network is untouched: {str(error) or 'too little memory to try what is left of it'}."
        ) from error
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        where = inside[-1] if inside else None
        message = f"{mode} fails{f' in {where}' if where else ''}: {type(error).__name__}: {first_line}"
        raise TrialFailed(message, where) from error


def _watch(name: str, layer: nn.Module, inside: list[str], deadline: float) -> list[RemovableHandle]:
    def enter(*_: Any) -> None:
        inside.append(name)
        check_limits(deadline, "the pruned network was tried")

    def leave(*_: Any) -> None:
        inside.pop()

    return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]


def _mask(twin: nn.Module, graph: ChannelGraph, units: Sequence[int]) -> None:
    tensors = named_tensors(twin)
    for name, dims in removed_indices(graph, units).items():
        tensor = tensors[name]
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()  # the values stay for the next trial
            for dim, lost in enumerate(dims):
                if lost is not None:
                    tensor.data.index_fill_(dim, torch.as_tensor(lost, device=tensor.device), 0)


def _compare_shapes(outputs: Sequence[Tensor], expected: Sequence[tuple[int, ...]] | None, mode: str) -> None:
    shapes = [tuple(tensor.shape) for tensor in outputs]
    if shapes != expected:
        raise TrialFailed(f"in {mode} the outputs have shapes {shapes}, not {expected}")


def _compare_values(one: Tensor, other: Tensor) -> None:
    if not other.is_floating_point() or not bool(torch.isfinite(other).all()) or not other.numel():
        return
    half = other.dtype in (torch.float16, torch.bfloat16)
    spread = float(other.max() - other.min())
    one, other = one.cpu(), other.cpu()  # MPS has no float64
    largest = float((one.double() - other.double()).abs().max())
    if not largest <= (0.2 if half else 0.02) * spread + (1e-2 if half else 1e-4) * float(other.abs().max()) + 1e-30:
        raise TrialFailed(
            "channels meet others than before: the outputs are not those with zeros in place of what goes"
        )
