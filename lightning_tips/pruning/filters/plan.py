"""What to cut from a network, as plain data, and what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lightning_tips.core.resize import Kept
from lightning_tips.pruning.networks.measure import Cost
from lightning_tips.pruning.tracing.graph import ChannelGraph, removed_indices

NOT_LOWEST = "none of its channels are among the lowest"
SCOPES = ("isomorphic", "global", "global_raw", "layer")


@dataclass(frozen=True)
class PruningPlan:
    """What to cut from a network. Plain data: rank 0 makes it, all ranks carry it out by ``keep_indices``.

    Args:
        kept: What stays of each tensor; those that stay whole are left out.
        channels: For each convolution and linear layer that loses output channels, their numbers before and after.
        left_out: Layers that lose none, and why.
        before: What the network costs for the example inputs.
        after: What it will cost.
        notes: What else should be known.
    """

    kept: Kept
    channels: dict[str, tuple[int, int]]
    left_out: dict[str, str]
    before: Cost
    after: Cost
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, that a checkpoint with ``weights_only=True`` can hold."""
        return {
            "kept": {name: [None if d is None else list(d) for d in dims] for name, dims in self.kept.items()},
            "channels": {name: list(pair) for name, pair in self.channels.items()},
            "left_out": dict(self.left_out),
            "before": asdict(self.before),
            "after": asdict(self.after),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningPlan:
        """The plan that :meth:`to_dict` gave."""
        return cls(
            kept=data["kept"],
            channels={name: (int(a), int(b)) for name, (a, b) in data["channels"].items()},
            left_out=dict(data["left_out"]),
            before=Cost(**data["before"]),
            after=Cost(**data["after"]),
            notes=tuple(data["notes"]),
        )


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Args:
        target: Shares of ``macs``, ``parameters`` and ``filters`` to get to, of those of ``reference``.
        filters: Or how many filters to remove at most.
        scope: See ``plan_filters``.
        floor: Share of a layer's channels that has to stay.
        round_to: What the number of channels of a layer should be a multiple of.
        limits: For layers by name, the largest share of their channels that may go.
        channels: Channels of layers that ``floor`` and ``limits`` refer to, where the network has been pruned before.
        reference: What the shares in ``target`` refer to.
    """

    target: Mapping[str, float] | None
    filters: int | None
    scope: str
    floor: float
    round_to: int | None
    limits: Mapping[str, float]
    channels: Mapping[str, int]
    reference: Cost


def build_plan(graph: ChannelGraph, units: Sequence[int], left_out: dict[str, str], before: Cost, after: Cost) -> Any:
    """The plan for units that go."""
    gone = removed_indices(graph, units)
    kept: dict[str, list[list[int] | None]] = {}
    for name, dims in gone.items():
        kept[name] = [
            None if lost is None else np.setdiff1d(np.arange(size), lost).tolist()
            for size, lost in zip(graph.shapes[name], dims, strict=True)
        ]
    channels: dict[str, tuple[int, int]] = {}
    for group in graph.groups:
        for layer in group.layers:
            weight = graph.weights[layer]
            dim = graph.filters[layer][1] if layer in graph.filters else 0
            left = kept.get(weight, [None] * 2)[dim]
            if left is not None:
                channels[layer] = (graph.shapes[weight][dim], len(left))
    return PruningPlan(
        kept=kept,
        channels=channels,
        left_out={layer: reason for layer, reason in left_out.items() if layer not in channels},
        before=before,
        after=after,
        notes=(
            *graph.notes,
            *(
                f"some channels of {layer} stay: {reason}"
                for layer, reason in left_out.items()
                if layer in channels and reason != NOT_LOWEST
            ),
        ),
    )
