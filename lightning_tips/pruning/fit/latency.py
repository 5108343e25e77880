"""A plan for a measured time: MACs are chosen, the time of the pruned copy decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_tips.core import keep_indices
from lightning_tips.pruning.filters.plan import PruningPlan
from lightning_tips.pruning.fit.capture import Inputs, batch_size, mapped
from lightning_tips.pruning.networks.copies import copy_network
from lightning_tips.pruning.networks.measure import measure_latencies, measure_latency

TRIALS = 7
LEAST = 0.02  # share of the MACs


def time_of(network: nn.Module, inputs: Inputs) -> float:
    """Median seconds of a forward pass, on the network's device."""
    return measure_latency(network, inputs).median


def time_share(network: nn.Module, plan: PruningPlan, inputs: Inputs) -> float:
    """The time of the network after a plan, as a share of its time before it; both are measured in turns."""
    pruned = copy_network(network)
    keep_indices(pruned, plan.kept)
    new, old = measure_latencies([pruned, network], inputs)
    return new.median / old.median


def of_size(inputs: Inputs, size: int) -> Inputs:
    """The same inputs as a batch of another size: samples are repeated."""
    now = batch_size(inputs)
    if not now:
        return inputs
    times = -(-size // now)

    def resize(tensor: Any) -> Any:
        if not tensor.ndim or len(tensor) != now:
            return tensor
        return tensor.repeat(times, *[1] * (tensor.ndim - 1))[:size]

    return mapped(inputs, resize)


def plan_for_latency(
    network: nn.Module,
    inputs: Inputs,
    target: Mapping[str, float],
    plan: Callable[[dict[str, float]], PruningPlan],
) -> PruningPlan:
    """The plan that takes out least among those that are fast enough, by bisection over the share of MACs.

    Args:
        network: Stays as it is; copies are pruned and measured beside it, in turns.
        inputs: What the time is measured with.
        target: ``"latency"``, and perhaps other kinds, as shares of the network as it is now.
        plan: Makes a plan for a target of MACs, and the other kinds.

    Raises:
        ValueError: If no plan is fast enough; the message says how far one gets.
    """
    wanted = target["latency"]
    others = {name: share for name, share in target.items() if name != "latency"}
    low, high, share = LEAST, others.get("macs", 1.0), min(wanted, others.get("macs", 1.0))
    best: PruningPlan | None = None
    fastest = 1.0
    failure = ""
    for _ in range(TRIALS):
        try:
            found = plan(others | {"macs": share})
        except ValueError as error:
            low, failure = share, str(error)
        else:
            ratio = time_share(network, found, inputs)
            fastest = min(fastest, ratio)
            if ratio <= wanted:
                best, low = found, share
            else:
                high = share
        share = (low + high) / 2
    if best is None:
        raise ValueError(
            f"No plan takes {wanted:.3f} of the time that the network takes now: one gets to {fastest:.3f}. {failure}"
        )
    return best
