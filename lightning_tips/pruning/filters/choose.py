"""Which channels go: a ranking over groups, and as much of it as the target asks for; what is left costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from lightning_tips.pruning.filters.plan import NOT_LOWEST, Wish
from lightning_tips.pruning.networks.measure import Cost
from lightning_tips.pruning.tracing.graph import ChannelGraph, Group
from lightning_tips.pruning.tracing.links import Key


class CostModel:
    """What the network costs after so many units of each group have gone."""

    def __init__(self, graph: ChannelGraph, groups: Sequence[Group], factor: float) -> None:
        self._factor = factor
        self._keys: dict[Key, int] = {}
        sizes: list[int] = []
        for name, shape in graph.shapes.items():
            for dim, size in enumerate(shape):
                self._keys[name, dim] = len(sizes)
                sizes.append(size)
        for name in graph.entries:
            self._keys[name, -1] = len(sizes)
            sizes.append(int(np.prod(graph.shapes[name])))
        self._sizes = np.array(sizes, dtype=np.float64)
        self._loss = np.zeros((len(sizes), len(groups)))
        for column, group in enumerate(groups):
            for key, count in group.per_unit.items():
                self._loss[self._keys[key], column] = count
        self._graph = graph
        self._tensors = [
            np.array([self._keys[name, -1]])
            if name in graph.entries
            else np.array([self._keys[name, dim] for dim in range(len(graph.shapes[name]))], dtype=int)
            for name in graph.parameters
        ]
        self._filters = np.array([self._keys[key] for key in graph.filters.values()], dtype=int)
        self._weights = [
            (np.array([self._keys[name, d] for d in range(len(graph.shapes[name]))]), graph.positions[layer])
            for layer, name in graph.weights.items()
            if layer in graph.positions
        ]
        self._other_macs = graph.macs - sum(self._sizes[dims].prod() * n for dims, n in self._weights)

    def after(self, numbers: Any) -> Cost:
        """The cost after ``numbers[i]`` units of group ``i`` have gone."""
        left = self._sizes - self._loss @ numbers
        macs = self._other_macs + sum(left[dims].prod() * n for dims, n in self._weights)
        return Cost(
            macs=round(float(macs) * self._factor),
            parameters=round(sum(float(left[dims].prod()) for dims in self._tensors)),
            filters=round(float(left[self._filters].sum())),
        )


GIVE_BACK = 64
"""How many of the last chunks are looked at again, whether the target is met without them."""


@dataclass
class _Ranked:
    """A group with its units in the order in which they go, in chunks that go together."""

    group: Group
    scores: Any
    chunks: list[Any] = field(default_factory=list)
    why_whole: str = ""


def choose(
    graph: ChannelGraph, groups: Sequence[Group], scores: Mapping[str, Tensor], wish: Wish, factor: float
) -> Any:
    """Chooses the units that go.

    Args:
        graph: The network's graph.
        groups: Those of its groups that may be pruned.
        scores: For each of their layers, the channels' scores.
        wish: What is asked for.
        factor: How many times larger the real batch is than the one in the graph.

    Returns:
        The numbers of the units that go, the cost after it, and for groups that stay whole the reason, by their index.

    Raises:
        ValueError: If the target is met already, or cannot be reached.
    """
    ranked = [_rank(graph, group, scores, wish) for group in groups]
    costs = CostModel(graph, groups, factor)
    order = _order(ranked, wish.scope)
    before = costs.after(np.zeros(len(groups)))
    of_group = np.array([index for index, _ in order], dtype=np.int64)
    sizes = np.array([len(chunk) for _, chunk in order], dtype=np.float64)

    def numbers(chosen: Any) -> Any:  # of units, by group
        return np.bincount(of_group[chosen], weights=sizes[chosen], minlength=len(groups))

    goals = _goals(wish, before)
    _check_reachable(goals, before, costs.after(numbers(slice(None))), wish)
    if wish.filters is not None:
        chosen = _at_most(of_group, wish.filters, before, lambda some: costs.after(numbers(some)))
    else:
        low, high = 1, len(order)
        while low < high:  # the shortest prefix that meets the goals
            middle = (low + high) // 2
            if _met(goals, costs.after(numbers(slice(middle)))):
                high = middle
            else:
                low = middle + 1
        chosen = _give_back(low, of_group, lambda some: _met(goals, costs.after(numbers(some))))
    taken = [order[place] for place in chosen]
    units = [int(unit) for index, chunk in taken for unit in ranked[index].group.units[chunk]]
    touched = {index for index, _ in taken}
    whole = {index: one.why_whole or NOT_LOWEST for index, one in enumerate(ranked) if index not in touched}
    return units, costs.after(numbers(np.array(chosen, dtype=np.int64))), whole


def _rank(graph: ChannelGraph, group: Group, scores: Mapping[str, Tensor], wish: Wish) -> _Ranked:
    """The units from the lowest score up, without those that have to stay, in chunks."""
    number = len(group.units)
    means = [scores[layer].detach().cpu().double().numpy()[at].mean(1) for layer, at in group.layers.items()]
    score = np.mean(means, axis=0)
    ranked = _Ranked(group, score)
    most = number - 1
    step = first = 1
    for layer, at in group.layers.items():
        each = at.shape[1]
        size = graph.shapes[graph.weights[layer]][graph.filters[layer][1] if layer in graph.filters else 0]
        full = wish.channels.get(layer, size)
        share = max(wish.floor, 1 - wish.limits.get(layer, 1.0))
        may_go = size - share * full  # of the layer
        mine = number * each / size  # this group's part of it
        most = min(most, int(np.floor(may_go * mine / each + 1e-9)))
        if wish.round_to:
            unit_step = int(wish.round_to // np.gcd(wish.round_to, each))
            if step % unit_step:
                step = int(np.lcm(step, unit_step))
                first = number % step or step
    for (name, dim), least in graph.at_least.items():
        count = group.per_unit.get((name, dim), 0)
        if count:
            most = min(most, (graph.shapes[name][dim] - least) // count)
    order = np.argsort(score, kind="stable")
    taken = 0
    while taken + (first if taken == 0 else step) <= most:
        size = first if taken == 0 else step
        ranked.chunks.append(order[taken : taken + size])
        taken += size
    if not ranked.chunks:
        ranked.why_whole = (
            f"round_to={wish.round_to} leaves nothing to remove of its {number}"
            if wish.round_to and most > 0
            else "is as small as floor and limits allow"
        )
    return ranked


def _order(ranked: Sequence[_Ranked], scope: str) -> list[tuple[int, Any]]:
    """All chunks in the order in which they go: (index of the group, units in it)."""
    entries: list[tuple[float, int, int, Any]] = []
    if scope in ("global", "global_raw"):
        for index, one in enumerate(ranked):
            mean = float(one.scores.mean())
            scale = mean if scope == "global" and mean > 0 else 1.0
            highest = -np.inf
            for place, (chunk, score) in enumerate(zip(one.chunks, _chunk_means(one), strict=True)):
                highest = max(highest, score / scale)  # chunks go in order
                entries.append((highest, index, place, chunk))
    else:
        classes: dict[Any, list[int]] = {}
        for index, one in enumerate(ranked):
            classes.setdefault(one.group.kind if scope == "isomorphic" else index, []).append(index)
        for members in classes.values():
            total = sum(len(ranked[index].scores) for index in members)
            inside = []
            for index in members:
                one = ranked[index]
                mean = float(one.scores.mean())
                highest = -np.inf
                for place, (chunk, score) in enumerate(zip(one.chunks, _chunk_means(one), strict=True)):
                    highest = max(highest, score / (mean if mean > 0 else 1.0))
                    inside.append((highest, index, place, chunk))
            done = 0
            for _, index, place, chunk in sorted(inside, key=lambda entry: entry[:3]):
                done += len(chunk)
                entries.append(((done - len(chunk) / 2) / total, index, place, chunk))
    entries.sort(key=lambda entry: entry[:3])
    return [(index, chunk) for _, index, _, chunk in entries]


def _chunk_means(one: _Ranked) -> list[float]:
    """The mean score of each chunk."""
    if not one.chunks:
        return []
    sizes = np.array([len(chunk) for chunk in one.chunks])
    sums = np.add.reduceat(one.scores[np.concatenate(one.chunks)], np.cumsum(sizes) - sizes)
    means: list[float] = (sums / sizes).tolist()
    return means


def _goals(wish: Wish, before: Cost) -> dict[str, float]:
    if wish.target is None:
        return {}
    return {name: share * getattr(wish.reference, name) for name, share in wish.target.items()}


def _met(goals: Mapping[str, float], cost: Cost) -> bool:
    return all(getattr(cost, name) <= goal for name, goal in goals.items())


def _check_reachable(goals: Mapping[str, float], before: Cost, least: Cost, wish: Wish) -> None:
    if goals and _met(goals, before):
        now = ", ".join(f"{name} {getattr(before, name) / getattr(wish.reference, name):.3f}" for name in goals)
        raise ValueError(f"The target {dict(wish.target or {})} is met already: the network has {now}.")
    for name, goal in goals.items():
        if getattr(least, name) > goal:
            full = getattr(wish.reference, name)
            raise ValueError(
                f"The target {name} {goal / full:.3f} cannot be reached: one gets to {getattr(least, name) / full:.3f}"
                f" ({getattr(least, name):,} of {full:,}). Lower floor (now {wish.floor}), loosen limits, round_to,"
                " protect or inner_only, or ask for less."
            )


def _give_back(length: int, of_group: Any, enough: Callable[[Any], bool]) -> list[int]:
    """The places of a prefix, without those near its end that are not needed.

    Chunks of one group go in order, so that only the last one of each may come back.
    """
    chosen = list(range(length))
    closed: set[int] = set()
    for place in range(length - 1, max(0, length - 1 - GIVE_BACK), -1):
        without = [other for other in chosen if other != place]
        if of_group[place] not in closed and enough(np.array(without, dtype=np.int64)):
            chosen = without
        else:
            closed.add(int(of_group[place]))
    return chosen


def _at_most(of_group: Any, filters: int, before: Cost, cost: Callable[[Any], Cost]) -> list[int]:
    """As many places from the front as remove at most so many filters; one that is too large ends its group."""
    low, high = 0, len(of_group)
    while low < high:
        middle = (low + high + 1) // 2
        if before.filters - cost(slice(middle)).filters <= filters:
            low = middle
        else:
            high = middle - 1
    chosen = list(range(low))
    closed: set[int] = set()
    removed = before.filters - cost(slice(low)).filters
    for place in range(low, len(of_group)):
        if removed == filters:
            break
        if int(of_group[place]) in closed:
            continue
        more = before.filters - cost(np.array([*chosen, place], dtype=np.int64)).filters
        if more <= filters:
            chosen.append(place)
            removed = more
        else:
            closed.add(int(of_group[place]))
    if not chosen:
        raise ValueError(
            f"filters={filters} is less than any group of channels that goes together; ask for more, or use inner_only."
        )
    return chosen
