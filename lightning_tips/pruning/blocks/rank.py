"""Which residual block does a network need least: by a metric without it, by its outputs, by the size of its branch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_tips.core import did_you_mean
from lightning_tips.core.resize import RemovedBlock
from lightning_tips.pruning.blocks.find import Block, without
from lightning_tips.pruning.networks.copies import copy_network
from lightning_tips.pruning.networks.recalibrate import reestimate_batch_norm
from lightning_tips.pruning.networks.runs import Forward, default_forward, device_of, moved, untouched
from lightning_tips.pruning.tracing.trace import tensors_in

BLOCK_CRITERIA = ("metric", "outputs", "branch_norm")


def rank_blocks(
    model: nn.Module,
    blocks: Sequence[Block],
    criterion: str = "metric",
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    mode: str = "max",
    batches: Iterable[Any] | None = None,
    recalibrate: bool = True,
    forward: Forward | None = None,
) -> dict[str, float]:
    """Scores of blocks; the lower, the less a block is missed.

    ``"metric"``: by how much a metric is worse without the block (Veit et al. 2016 look at the error so).
    ``"outputs"``: how far the network's outputs move without it: ``||y_without - y|| / ||y||`` over ``batches``, which
    needs no targets. ``"branch_norm"``: what the block does to its input, ``||block(x) - activation(x)|| /
    ||activation(x)||``, the mean over samples; one pass for all blocks.

    BatchNorm's statistics after a missing block are wrong, and most of what a network then loses is due to that: by
    default they are estimated anew before the first two criteria look at it.

    Args:
        model: The network; it stays as it is.
        blocks: From :func:`find_blocks`; those that are not removable get no score.
        criterion: See above.
        evaluate: For ``"metric"``: returns the metric of a network, which is on the model's device and in eval mode.
        mode: Whether the metric is to be ``"max"`` or ``"min"``.
        batches: Inputs, or batches with inputs first: training batches where statistics are estimated from them.
        recalibrate: Whether to estimate BatchNorm's statistics anew without each block.
        forward: ``forward(model, batch)``; by default the model is called with the batch's inputs.

    Returns:
        By block name, in the order of ``blocks``.

    Raises:
        ValueError: For an unknown criterion, where it lacks ``evaluate`` or ``batches``, or where it is not finite.
    """
    batches = None if batches is None else list(batches)
    check_criterion(criterion, evaluate, mode, batches, recalibrate and has_batch_norm(model))
    candidates = {block.name: block.activation for block in blocks if block.removable}
    run = forward or default_forward
    if criterion == "branch_norm":
        assert batches is not None
        return _branch_norms(model, candidates, batches, run)
    twin = copy_network(model).eval()
    saved = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    anew = batches if recalibrate and batches and has_batch_norm(twin) else []
    before, expected = 0.0, list[Tensor]()
    if criterion == "metric":
        before = _metric(twin, evaluate, mode)
        if not math.isfinite(before):
            raise ValueError(
                "The metric of the network with all its blocks is not finite, so nothing can be told by it."
            )
    else:
        if anew:  # so that it is the block that makes the difference, and not the batches
            reestimate_batch_norm(twin, anew, forward=run, include_frozen=True)
        expected = _outputs(twin, batches or [], run)
    scores = {}
    for name, activation in candidates.items():
        with without(twin, {name: activation}):
            if anew:
                reestimate_batch_norm(twin, anew, forward=run, include_frozen=True)
            if criterion == "metric":
                scores[name] = before - _metric(twin, evaluate, mode)
            else:
                scores[name] = _distance(_outputs(twin, batches or [], run), expected)
        for buffer_name, buffer in twin.named_buffers():
            buffer.copy_(saved[buffer_name])
    if scores and not any(math.isfinite(score) for score in scores.values()):
        raise ValueError(f"{criterion!r} is not finite without whichever block: {', '.join(scores)}.")
    return scores


def check_criterion(
    criterion: str,
    evaluate: Callable[[nn.Module], float] | None,
    mode: str,
    batches: Sequence[Any] | None,
    needs_statistics: bool,
) -> None:
    """Raises ValueError where a criterion is unknown or lacks what it looks at."""
    if criterion not in BLOCK_CRITERIA:
        raise ValueError(f"There is no criterion {criterion!r}. {did_you_mean(str(criterion), BLOCK_CRITERIA)}")
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r} must be 'min' or 'max'.")
    if criterion == "metric" and evaluate is None:
        raise ValueError("criterion='metric' needs evaluate, a function of the network that returns the metric.")
    if criterion != "metric" and not batches:
        raise ValueError(f"criterion={criterion!r} looks at data: pass batches.")
    if criterion == "metric" and needs_statistics and not batches:
        raise ValueError(
            "The network has BatchNorm, whose statistics are wrong without a block: pass training batches to estimate"
            " them from, or recalibrate=False to take the network as it is."
        )


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a BatchNorm keeps running statistics."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        for module in model.modules()
    )


def _metric(twin: nn.Module, evaluate: Callable[[nn.Module], float] | None, mode: str) -> float:
    assert evaluate is not None
    with untouched(twin):
        value = float(evaluate(twin))
    if not math.isfinite(value):
        return -math.inf  # the worst, in either mode
    return value if mode == "max" else -value


def _outputs(model: nn.Module, batches: Sequence[Any], forward: Forward) -> list[Tensor]:
    device = device_of(model)
    with untouched(model):
        return [
            tensor.float()
            for batch in batches
            for tensor in tensors_in(forward(model, moved(batch, device)))
            if tensor.is_floating_point()
        ]


def _distance(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    square = sum(float((a - b).square().sum()) for a, b in zip(outputs, expected, strict=True))
    whole = sum(float(b.square().sum()) for b in expected)
    distance = math.sqrt(square / max(whole, 1e-30))
    return distance if math.isfinite(distance) else math.inf


def _branch_norms(
    model: nn.Module, candidates: Mapping[str, str], batches: Sequence[Any], forward: Forward
) -> dict[str, float]:
    sums = dict.fromkeys(candidates, 0.0)
    counts = dict.fromkeys(candidates, 0)
    handles = []
    inputs: dict[str, Tensor] = {}
    for name, activation in candidates.items():
        block = model.get_submodule(name)
        stand_in = RemovedBlock(block, activation)

        def before(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            inputs[name] = args[0].clone()  # a block may work in place

        def after(_: nn.Module, args: Any, output: Tensor, name: str = name, stand_in: RemovedBlock = stand_in) -> None:
            passed = stand_in(inputs.pop(name)).flatten(1).float()
            change = (output.flatten(1).float() - passed).norm(dim=1) / passed.norm(dim=1).clamp(min=1e-12)
            sums[name] += float(change.sum())
            counts[name] += len(change)

        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    device = device_of(model)
    try:
        with untouched(model):
            for batch in batches:
                forward(model, moved(batch, device))
    finally:
        for handle in handles:
            handle.remove()
    if never := [name for name, count in counts.items() if not count]:
        raise ValueError(f"These blocks did not run on the batches: {', '.join(never)}.")
    return {name: sums[name] / counts[name] for name in candidates}
