"""A network with fewer filters, in place: the pure function of tip 7."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from lightning_tips.core import keep_indices, render_table
from lightning_tips.pruning.filters.arguments import check_arguments, check_model, matching, model_layers
from lightning_tips.pruning.filters.choose import CostModel
from lightning_tips.pruning.filters.plan import PruningPlan, Wish
from lightning_tips.pruning.filters.settle import candidates, require, settle
from lightning_tips.pruning.networks.copies import copy_network, nothing_remembered, prepare_inputs
from lightning_tips.pruning.networks.limits import WithinLimits
from lightning_tips.pruning.networks.measure import Cost
from lightning_tips.pruning.networks.runs import Forward, call
from lightning_tips.pruning.ranking.criteria import Criterion, channel_scores
from lightning_tips.pruning.tracing.graph import analyse


@dataclass(frozen=True)
class PruningReport:
    """What was removed. ``print(report)`` shows it as tables.

    Args:
        plan: What was carried out.
        seconds: Wall time of planning, trying and cutting.
    """

    plan: PruningPlan
    seconds: float

    @property
    def ratios(self) -> dict[str, float]:
        """What is left, as shares: ``macs``, ``parameters`` and ``filters``."""
        before, after = self.plan.before, self.plan.after
        return {
            name: getattr(after, name) / max(1, getattr(before, name)) for name in ("macs", "parameters", "filters")
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**self.plan.to_dict(), "seconds": self.seconds, "ratios": self.ratios}

    def __str__(self) -> str:
        plan = self.plan
        costs = render_table(
            ("", "before", "after", "left"),
            [
                (name, f"{getattr(plan.before, name):,}", f"{getattr(plan.after, name):,}", f"{left:.1%}")
                for name, left in self.ratios.items()
            ],
        )
        layers = render_table(
            ("layer", "before", "after", "left"),
            [(name, str(a), str(b), f"{b / a:.0%}") for name, (a, b) in plan.channels.items()],
        )
        parts = ["Pruned", costs, "Channels", layers]
        if plan.left_out:
            parts += ["Left as they are", *(f"  {name}: {reason}" for name, reason in plan.left_out.items())]
        return "\n".join([*parts, *(f"Note: {note}" for note in plan.notes)])


def plan_filters(
    model: nn.Module,
    example_inputs: Any,
    criterion: Criterion = "l1",
    *,
    target: Mapping[str, float] | None = None,
    filters: int | None = None,
    scope: str = "isomorphic",
    inner_only: bool | None = None,
    floor: float = 0.1,
    round_to: int | None = None,
    protect: Sequence[str] = (),
    limits: Mapping[str, float] | None = None,
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
    loss: Any = None,
    score_forward: Any = None,
    seed: int = 0,
    reduce: Any = None,
    reference: Cost | None = None,
    channels: Mapping[str, int] | None = None,
    time_limit: float = 300.0,
) -> PruningPlan:
    """Plans which filters go, and tries it on a copy; the network itself stays as it is, to the bit.

    Which channels belong together is found by running a copy of the network once in eval and once in train mode, with
    labels of channels that go through every operation. What feeds the outputs stays. The plan is carried out on a copy:
    outputs keep their shapes in eval and in train mode, a backward pass runs, and, unless the network averages over
    channels (LayerNorm, GroupNorm, ...), the outputs are those of the whole network with zeros in place of what goes.
    Groups that break it are left out and named.

    Args:
        model: The network, in any mode and on any device.
        example_inputs: A tensor, a tuple or list of arguments or a dict of them, with the batch first. One sample of
            them is used.
        criterion: Which channels matter least, see :func:`channel_scores`; the mean over layers that go together.
        target: Shares to get to, ``{"macs": 0.5}``, ``{"parameters": 0.4}`` (or ``"params"``), ``{"filters": 0.5}``;
            all of them are met, as closely as whole channels allow, from below.
        filters: Instead, how many filters to remove at most (the m of Li et al. 2017).
        scope: Which channels are ranked together. ``isomorphic``: those of groups of the same structure, divided by
            their group's mean, the same share of each structure (Fang et al. 2024, "Isomorphic Pruning"). ``global``:
            all, divided by their group's mean. ``global_raw``: all, as they are (Li et al. 2017). ``layer``: the same
            share of each group.
        inner_only: Leave out channels that take part in sums with shortcuts. By default only for ``apoz``, which does
            not know zeros before such a sum, and then always.
        floor: Share of each layer's channels that stays.
        round_to: Numbers of channels become multiples of it. Layers lose fewer channels rather than more, and the
            target is still met, if it can be.
        protect: Layers, or modules with all layers in them, whose output channels stay: names or patterns such as
            ``"layer4.*"``.
        limits: For layers by name or pattern, the largest share of output channels that may go.
        batches: Data for criteria that need it.
        forward: ``forward(model, example_inputs)`` returns all outputs. By default the model is called.
        loss: ``loss(model, batch)`` for ``taylor``.
        score_forward: ``forward(model, batch)`` for criteria that need data.
        seed: For the criterion ``random``.
        reduce: Sums scores over ranks, see :func:`channel_scores`.
        reference: What the shares in ``target`` refer to; by default the network as it is. For several steps pass the
            cost of the network before the first one.
        channels: What ``floor`` and ``limits`` refer to: channels of layers before the first step.
        time_limit: Seconds, also for the scores (between batches; not with ``reduce``, where all ranks have to agree).
            Memory stays below that of a training step with two samples; where less than 256 MiB are left, it ends.

    Raises:
        ValueError: Bad arguments, no convolution, unknown layer names (with the nearest ones), target met already or
            not reachable (with how far one gets), a network that cannot be run, or nothing that can be pruned.
    """
    deadline = time.monotonic() + time_limit
    check_model(model)
    goal = check_arguments(model, criterion, target, filters, scope, floor, round_to)
    protected = matching(model, protect, "protect")
    limit_of = {
        layer: share for pattern, share in (limits or {}).items() for layer in matching(model, [pattern], "limits")
    }
    if any(not 0 <= share <= 1 for share in limit_of.values()):
        raise ValueError("limits are shares of channels that may go, between 0 and 1.")
    run = forward or call
    inner = bool(inner_only) or criterion == "apoz"
    with nothing_remembered():
        inputs, factor = prepare_inputs(model, example_inputs, 1)
        twin = copy_network(model)
        graph = analyse(twin, inputs, run, deadline)
    groups, left_out = candidates(graph, protected, inner, filters_only=filters is not None or set(goal) == {"filters"})
    require(groups, left_out, graph)
    names = [layer for layer in model_layers(model) if any(layer in group.layers for group in groups)]
    limited = batches if batches is None or reduce is not None else WithinLimits(batches, deadline)
    scores = channel_scores(
        model, names, criterion, limited, score_forward, loss, seed, reduce=reduce, example_inputs=example_inputs
    )
    before = CostModel(graph, groups, factor).after(np.zeros(len(groups)))
    wish = Wish(goal or None, filters, scope, floor, round_to, limit_of, channels or {}, reference or before)
    with nothing_remembered():
        return settle(twin, inputs, run, graph, groups, left_out, scores, wish, factor, deadline)


def prune_filters(
    model: nn.Module,
    example_inputs: Any,
    criterion: Criterion = "l1",
    *,
    target: Mapping[str, float] | None = None,
    filters: int | None = None,
    optimizers: Iterable[Optimizer] = (),
    **options: Any,
) -> PruningReport:
    """Removes the filters that matter least, in place. The network is either smaller and works, or is untouched.

    Parameters keep their identity, so that optimizers, hooks and tied weights stay valid; ``requires_grad``, train and
    eval mode, memory format, dtype and random states stay as they are. A DistributedDataParallel around it has to be
    made anew.

    Args:
        model: The network.
        example_inputs: See :func:`plan_filters`.
        criterion: See :func:`channel_scores`.
        target: What to get to, for example ``{"macs": 0.5}``.
        filters: Instead, how many filters to remove at most.
        optimizers: Their state is cut with the weights.
        options: The other arguments of :func:`plan_filters`.

    Raises:
        ValueError: See :func:`plan_filters`.
    """
    start = time.perf_counter()
    plan = plan_filters(model, example_inputs, criterion, target=target, filters=filters, **options)
    keep_indices(model, plan.kept, optimizers)
    return PruningReport(plan, time.perf_counter() - start)
