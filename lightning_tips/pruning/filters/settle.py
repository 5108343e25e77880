"""Chooses what goes and tries it, without what breaks the network, until it works."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_tips.pruning.filters.choose import CostModel, choose
from lightning_tips.pruning.filters.plan import PruningPlan, Wish, build_plan
from lightning_tips.pruning.filters.trial import TrialFailed, find_offenders, try_plan
from lightning_tips.pruning.networks.copies import copy_network
from lightning_tips.pruning.networks.runs import Forward
from lightning_tips.pruning.tracing.graph import ChannelGraph, Group


def candidates(
    graph: ChannelGraph, protected: Sequence[str], inner: bool, filters_only: bool
) -> tuple[list[Group], dict[str, str]]:
    """The groups that may be pruned, and why the layers of the others stay."""
    left_out = dict(graph.fixed)
    groups = []
    for group in graph.groups:
        reason = None
        names = [layer for layer in group.layers if layer in protected]
        if names:
            reason = "is protected" if len(names) == len(group.layers) else f"goes together with {names[0]}, protected"
        elif inner and group.residual:
            reason = "takes part in a sum with other branches (inner_only)"
        elif filters_only and not any(layer in graph.filters for layer in group.layers):
            reason = "is no convolution, and filters are asked for"
        elif len(group.units) < 2:
            reason = "has a single channel that could go"
        if reason is None:
            groups.append(group)
        else:
            for layer in group.layers:
                left_out.setdefault(layer, "is protected" if layer in protected else reason)
    return groups, left_out


def require(groups: Sequence[Group], left_out: Mapping[str, str], graph: ChannelGraph) -> None:
    """Raises ``ValueError`` where nothing is left to prune."""
    if not groups:
        shown = "\n".join(f"  {layer}: {reason}" for layer, reason in list(left_out.items())[:10])
        raise ValueError(f"Nothing in the network can be pruned; it is untouched. Why, by layer:\n{shown}")


def settle(
    twin: nn.Module,
    inputs: Any,
    run: Forward,
    graph: ChannelGraph,
    groups: list[Group],
    left_out: dict[str, str],
    scores: Mapping[str, Tensor],
    wish: Wish,
    factor: float,
    deadline: float,
) -> PruningPlan:
    """Chooses and tries, without the groups that break the network, until it works."""
    costs_before = CostModel(graph, groups, factor).after(np.zeros(len(groups)))
    while True:
        units, after, whole = choose(graph, groups, scores, wish, factor)
        reasons = dict(left_out)
        for index, reason in whole.items():
            for layer in groups[index].layers:
                reasons.setdefault(layer, reason)
        plan = build_plan(graph, units, reasons, costs_before, after)
        offenders = _offenders(twin, inputs, run, graph, plan, units, groups, deadline)
        if not offenders:
            return plan
        for index, reason in offenders.items():
            for layer in groups[index].layers:
                left_out[layer] = f"pruning it breaks the network: {reason}"
        groups = [group for index, group in enumerate(groups) if index not in offenders]
        require(groups, left_out, graph)


def _offenders(
    twin: nn.Module,
    inputs: Any,
    run: Forward,
    graph: ChannelGraph,
    plan: PruningPlan,
    units: Sequence[int],
    groups: Sequence[Group],
    deadline: float,
) -> dict[int, str]:
    """By their index, the groups without which the plan works, and what happens with them; none if it works."""
    gone = set(units)
    found: dict[int, str] = {}
    left = [index for index, group in enumerate(groups) if gone & set(group.units.tolist())]

    comparable = True

    def attempt(indices: Sequence[int]) -> TrialFailed | None:
        mine = [unit for index in indices for unit in groups[index].units.tolist() if unit in gone]
        part = plan if len(mine) == len(gone) else build_plan(graph, mine, {}, plan.before, plan.after)
        exact = comparable and not any(groups[index].inexact for index in indices)
        try:
            # The whole network on a copy: what has failed may have left nodes of its graph at the tensors.
            try_plan(twin if indices else copy_network(twin), inputs, run, graph, part, mine, exact, deadline)
        except TrialFailed as error:
            problem = TrialFailed(str(error), error.layer)
            # What its frames hold of the graph would keep the shapes of this trial for the next backward pass.
            for one in (error, error.__cause__):
                if one is not None:
                    traceback.clear_frames(one.__traceback__)
            return problem
        return None

    problem = attempt(left)
    if problem is not None and attempt([]) is not None:  # the whole network fails too
        comparable = False  # its outputs are not the same twice
        broken = attempt([])
        if broken is not None:
            raise ValueError(f"The network does not work even before anything is removed: {broken}.")
        problem = attempt(left)
    while problem is not None:
        guilty = _blamed(graph, groups, left, problem.layer)
        if guilty:
            reasons = dict.fromkeys(guilty, str(problem))
        else:
            reasons = find_offenders(groups, left, attempt)
            if not reasons:
                raise ValueError(f"The pruned network does not work; it is untouched. {problem}.")
        found.update(reasons)
        left = [index for index in left if index not in found]
        problem = attempt(left)
    return found


def _blamed(graph: ChannelGraph, groups: Sequence[Group], indices: Sequence[int], layer: str | None) -> list[int]:
    """The groups that come into the layer that failed."""
    weight = graph.weights.get(layer or "")
    if layer is None or weight is None:
        return []
    outgoing = graph.filters.get(layer, (weight, 0))
    incoming = (weight, 1 - outgoing[1])
    return [index for index in indices if incoming in groups[index].per_unit]
