"""Whole residual blocks taken out of a network, in place: the pure functions of tip 7's second half."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tips.core import did_you_mean, render_table
from lightning_tips.pruning.blocks.find import Block, find_blocks, put_in_place, try_without
from lightning_tips.pruning.blocks.optimizers import keep_parameters
from lightning_tips.pruning.blocks.rank import check_criterion, has_batch_norm, rank_blocks
from lightning_tips.pruning.networks.copies import copy_network, nothing_remembered, prepare_inputs
from lightning_tips.pruning.networks.measure import Cost, check_goal, count_cost
from lightning_tips.pruning.networks.recalibrate import reestimate_batch_norm
from lightning_tips.pruning.networks.runs import Forward, call, default_forward

TARGETS = {"macs": "macs", "params": "parameters"}
"""What a target is called, and where a :class:`Cost` has it."""


@dataclass(frozen=True)
class BlockReport:
    """What was taken out. ``print(report)`` shows it as tables.

    Args:
        removed: By name, in the order of removal, the activation that stays there ("" for none).
        scores: Of each removed block when it was chosen; empty where names were given.
        left_out: Blocks that cannot be taken out, and why.
        before: Cost of the network on the example inputs.
        after: The same without the blocks.
        statistics: Buffers of BatchNorm without the blocks, by name, where they were estimated anew.
        seconds: Wall time of all of it.
    """

    removed: dict[str, str]
    scores: dict[str, float]
    left_out: dict[str, str]
    before: Cost
    after: Cost
    statistics: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    seconds: float = 0.0

    @property
    def ratios(self) -> dict[str, float]:
        """What is left, as shares: ``macs``, ``parameters`` and ``filters``."""
        before, after = asdict(self.before), asdict(self.after)
        return {name: after[name] / max(1, before[name]) for name in before}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the statistics."""
        plain = asdict(replace(self, statistics={})) | {"ratios": self.ratios}
        del plain["statistics"]
        return plain

    def __str__(self) -> str:
        before, after = asdict(self.before), asdict(self.after)
        costs = [(name, f"{before[name]:,}", f"{after[name]:,}", f"{left:.1%}") for name, left in self.ratios.items()]
        blocks = [
            (name, f"{self.scores[name]:.4g}" if name in self.scores else "", kept.lstrip("."))
            for name, kept in self.removed.items()
        ]
        parts = ["Blocks taken out", render_table(("block", "score", "stays"), blocks)]
        parts.append(render_table(("", "before", "after", "left"), costs))
        if self.left_out:
            parts += ["Cannot be taken out", *(f"  {name}: {reason}" for name, reason in self.left_out.items())]
        return "\n".join(parts)


def plan_blocks(
    model: nn.Module,
    example_inputs: Any,
    blocks: Sequence[str] | None = None,
    *,
    count: int | None = None,
    target: Mapping[str, float] | None = None,
    criterion: str = "metric",
    evaluate: Callable[[nn.Module], float] | None = None,
    mode: str = "max",
    batches: Iterable[Any] | None = None,
    recalibrate: bool = True,
    protect: Sequence[str] = (),
    reference: Cost | None = None,
    forward: Forward | None = None,
    score_forward: Forward | None = None,
) -> BlockReport:
    """Plans which residual blocks go: those that are named, or those that are missed least. ``model`` stays as it is.

    It is tried on a copy: forward in eval and train mode, shapes of the outputs, backward.

    Args:
        model: The network.
        example_inputs: A tensor, a tuple or list of arguments or a dict of them, with the batch dimension.
        blocks: Names of the blocks to take out; or else ``count`` or ``target``.
        count: How many; beside a target, how many at most.
        target: What is to be left, ``{"macs": 0.6}`` or ``{"params": 0.5}``: a share of the network, or above 1 a
            number. Blocks go one by one until it is met, the last one as a whole.
        criterion: ``"metric"``, ``"outputs"`` or ``"branch_norm"``, see :func:`rank_blocks`. Ranked anew after each
            block.
        evaluate: For ``"metric"``: returns the metric of a network.
        mode: Whether the metric is to be ``"max"`` or ``"min"``.
        batches: Training batches: for BatchNorm's statistics, and for the criteria that look at data.
        recalibrate: Whether BatchNorm's statistics are estimated anew from ``batches``: for each ranking, and for the
            network that is left.
        protect: Names or patterns of blocks that stay.
        reference: The cost that shares in ``target`` refer to; by default the model's own.
        forward: ``forward(model, example_inputs)``, where calling the model is not enough.
        score_forward: ``forward(model, batch)`` for ``batches``.

    Returns:
        What would be taken out, and the cost before and after.

    Raises:
        ValueError: If there is nothing to take out, a name is unknown or its block has to stay, a target is met
            already or out of reach, data or ``evaluate`` is missing, or the network does not work without the blocks.
    """
    started = time.perf_counter()
    _check_wish(blocks, count, target)
    batches = None if batches is None else list(batches)
    found = find_blocks(model, example_inputs, protect=protect, forward=forward)
    left_out = {block.name: block.reason for block in found if not block.removable}
    removable = [block for block in found if block.removable]
    if not removable:
        raise ValueError(_nothing(model, left_out))
    twin = copy_network(model)
    before = after = count_cost(twin, example_inputs)
    anew = batches if recalibrate and batches and has_batch_norm(model) else []
    chosen: dict[str, str] = {}
    scores: dict[str, float] = {}
    statistics: dict[str, Tensor] = {}

    def take(names: Mapping[str, str]) -> None:
        nonlocal after, statistics
        chosen.update(names)
        put_in_place(twin, names)
        after = count_cost(twin, example_inputs)
        if anew:  # frozen ones too, since they are wrong now
            run = score_forward or default_forward
            norms = set(reestimate_batch_norm(twin, anew, forward=run, include_frozen=True))
            statistics = {name: buffer for name, buffer in twin.named_buffers() if name.rpartition(".")[0] in norms}

    if blocks is not None:
        given = _given(blocks, found)
        _try(model, example_inputs, forward, given)
        take(given)
    else:
        check_criterion(criterion, evaluate, mode, batches, recalibrate and has_batch_norm(model))
        wish = _Wish(count, dict(target or {}), reference or before)
        wish.check(before, len(removable))
        while not wish.met(len(chosen), after):
            left = [block for block in removable if block.name not in chosen]
            if not left:
                raise ValueError(f"The target is out of reach: {wish.reached(after)} without all removable blocks.")
            # Ranked anew after each removal: with a neighbour gone, a block may matter more than before.
            ranks = rank_blocks(
                twin,
                left,
                criterion,
                evaluate=evaluate,
                mode=mode,
                batches=batches,
                recalibrate=recalibrate,
                forward=score_forward,
            )
            least = min(ranks, key=lambda name: ranks[name])
            scores[least] = ranks[least]
            take({block.name: block.activation for block in left if block.name == least})
        _try(model, example_inputs, forward, chosen)
    return BlockReport(chosen, scores, left_out, before, after, statistics, time.perf_counter() - started)


def remove_blocks(
    model: nn.Module,
    example_inputs: Any,
    blocks: Sequence[str] | None = None,
    *,
    count: int | None = None,
    target: Mapping[str, float] | None = None,
    optimizers: Iterable[Optimizer] = (),
    **options: Any,
) -> BlockReport:
    """Takes residual blocks out of a network, in place: those that are named, or those that are missed least.

    What stands in a block's place passes its input on and marks the place in every ``state_dict``, so that
    ``core.accept_other_shapes`` and ``load_pruned`` load it into a whole network.

    Args:
        model: The network; as it was, to the bit, if an error is raised.
        example_inputs: See :func:`plan_blocks`.
        blocks: Names of the blocks to take out; or else ``count`` or ``target``.
        count: How many; beside a target, how many at most.
        target: What is to be left, for example ``{"macs": 0.6}``.
        optimizers: Those that hold the parameters; those of removed blocks leave their groups and state.
        options: The other arguments of :func:`plan_blocks`.

    Returns:
        What was taken out, and the cost before and after.

    Raises:
        ValueError: See :func:`plan_blocks`.
    """
    started = time.perf_counter()
    report = plan_blocks(model, example_inputs, blocks, count=count, target=target, **options)
    take_out(model, report.removed, optimizers)
    for name, buffer in model.named_buffers():
        if name in report.statistics:
            buffer.copy_(report.statistics[name])
    return replace(report, seconds=time.perf_counter() - started)


def take_out(model: nn.Module, blocks: Mapping[str, str], optimizers: Iterable[Optimizer] = ()) -> None:
    """Takes blocks out of a network and their parameters out of the optimizers, in place, without looking further.

    Args:
        model: The network.
        blocks: By name, the activation that stays; see :class:`Block`.
        optimizers: Those that hold the parameters. Their groups stay, empty ones too, as schedulers count them.

    Raises:
        ValueError: If an optimizer would be left without parameters; nothing is changed then.
    """
    optimizers = list(optimizers)
    gone = {id(p) for name in blocks for p in model.get_submodule(name).parameters()}
    for optimizer in optimizers:
        if all(id(p) in gone for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(f"{type(optimizer).__name__} holds parameters of the removed blocks only.")
    out = put_in_place(model, blocks)
    for optimizer in optimizers:
        keep_parameters(optimizer, lambda p: id(p) not in gone)
    for block in out.values():
        block.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class _Wish:
    """When enough is taken out."""

    count: int | None
    target: dict[str, float]
    reference: Cost

    def _goal(self, name: str) -> float:
        value = self.target[name]
        return value if value > 1 else value * getattr(self.reference, TARGETS[name])

    def met(self, taken: int, cost: Cost) -> bool:
        enough = self.count is not None and taken >= self.count
        return enough or self.reaches(cost)

    def reaches(self, cost: Cost) -> bool:
        return bool(self.target) and all(getattr(cost, TARGETS[name]) <= self._goal(name) for name in self.target)

    def check(self, before: Cost, removable: int) -> None:
        if self.count is not None and not self.target and self.count > removable:
            raise ValueError(f"count={self.count}, but only {removable} blocks can be taken out.")
        if self.reaches(before):
            raise ValueError(f"The target is met already: {self.reached(before)}.")

    def reached(self, cost: Cost) -> str:
        return ", ".join(
            f"{name} {getattr(cost, TARGETS[name]):,} of {self._goal(name):,.0f} wanted" for name in self.target
        )


def _check_wish(blocks: Sequence[str] | None, count: int | None, target: Mapping[str, float] | None) -> None:
    if (blocks is None) == (count is None and target is None):
        raise ValueError("Say which blocks to take out: by their names in blocks, or by count, target or both.")
    if isinstance(blocks, str):
        raise TypeError(f"blocks is a list of names, such as [{blocks!r}].")
    if blocks is not None and not blocks:
        raise ValueError("blocks is empty.")
    if count is not None and count < 1:
        raise ValueError(f"count={count} must be at least 1.")
    if target is not None:
        check_target(target)


def check_target(target: Mapping[str, float]) -> None:
    """Raises ValueError for an unknown kind of target, or a share that is none."""
    if not target:
        raise ValueError("target is empty; it is, for example, {'macs': 0.6}.")
    for name, value in target.items():
        if name not in TARGETS:
            raise ValueError(f"target has no {name!r}. {did_you_mean(str(name), TARGETS)}")
        check_goal(name, value)


def _given(names: Sequence[str], found: Sequence[Block]) -> dict[str, str]:
    by_name = {block.name: block for block in found}
    for name in names:
        if name not in by_name:
            raise ValueError(f"There is no residual block {name!r}. {did_you_mean(name, by_name)}")
        if not by_name[name].removable:
            raise ValueError(f"{name} cannot be taken out: {by_name[name].reason}.")
    return {name: by_name[name].activation for name in names}


def _nothing(model: nn.Module, left_out: Mapping[str, str]) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
    return (
        f"{type(model).__name__} has no residual block that can be taken out"
        f"{f' ({reasons})' if reasons else ', no module that computes x + f(x) in the shape of x'}. Take filters out"
        " instead: prune_filters."
    )


def _try(model: nn.Module, example_inputs: Any, forward: Forward | None, chosen: Mapping[str, str]) -> None:
    twin = copy_network(model)
    inputs, _ = prepare_inputs(twin, example_inputs, samples=2)
    with nothing_remembered():
        if problem := try_without(twin, inputs, forward or call, chosen):
            raise ValueError(f"{', '.join(chosen)} cannot be taken out together: {problem}.")
