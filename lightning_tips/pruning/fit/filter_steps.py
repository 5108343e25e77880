"""What `FilterPruningCallback` takes out at a step: the data that ranks filters, the plan, the cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tips.core import keep_indices
from lightning_tips.pruning.filters.plan import PruningPlan
from lightning_tips.pruning.filters.prune import plan_filters
from lightning_tips.pruning.fit.base import PruningCallback
from lightning_tips.pruning.fit.capture import Inputs, call_network, is_validation_of_fit
from lightning_tips.pruning.fit.latency import of_size, plan_for_latency, time_of, time_share
from lightning_tips.pruning.fit.surroundings import read_elsewhere
from lightning_tips.pruning.networks.copies import real_names
from lightning_tips.pruning.networks.measure import Cost, count_cost
from lightning_tips.pruning.ranking.data_criteria import GradientScores

KEYS = {"macs": "macs", "params": "parameters", "filters": "filters"}
"""What a target is called, and where a :class:`Cost` has it."""
READ_ELSEWHERE = "may be read by a layer that does not run in this call"


class FilterSteps(PruningCallback):
    """Ranks filters and takes them out. The attributes are arguments of `FilterPruningCallback`."""

    criterion: str | Callable[[str, nn.Module], Tensor]
    filters_per_step: int | float | None
    round_to: int | None
    scope: str
    plan: dict[str, Any]
    latency_batch: int
    _taylor: GradientScores | None
    _channels: dict[str, list[int]]
    _elsewhere: list[str]

    # ---- data for the criterion

    @property
    def _looks_at_activations(self) -> bool:
        return self.criterion in ("mean_activation", "apoz")

    def _wants_validation(self) -> bool:
        found = self._network is not None and not self._finished
        return found and self._looks_at_activations and not self._validation.full

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins anew where the last validation did not fill the sample: it brings the same batches again."""
        super().on_validation_start(trainer, pl_module)
        if is_validation_of_fit(trainer) and self._wants_validation():
            self._validation.clear()

    def _take_validation(self, trainer: pl.Trainer, inputs: Inputs | None) -> None:
        self._validation.note(trainer, inputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes together what the ranks have seen."""
        super().on_validation_epoch_end(trainer, pl_module)
        if is_validation_of_fit(trainer) and self._wants_validation():
            self._validation.add_noted(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Adds up what ``"taylor"`` needs."""
        if self._taylor is not None and not self._finished and self._network is not None:
            self._taylor.add(self._target(pl_module)[0], optimizer)

    # ---- what is taken out

    def _at_a_time(self) -> str | None:
        each = self.filters_per_step
        if each is None:
            return None
        return f"{each} filters at a time" if isinstance(each, int) else f"{each:.1%} of the filters at a time"

    def _measure(self, network: nn.Module, example: Inputs) -> dict[str, float]:
        cost = _as_numbers(count_cost(network, example))
        if "latency" in self.target:
            cost["latency"] = time_of(network, of_size(example, self.latency_batch))
        return cost

    def _check(self, network: nn.Module, example: Inputs) -> None:
        shares = self._shares()
        readers = read_elsewhere(network, example)
        self._elsewhere = list(readers)
        counted = {name: share for name, share in shares.items() if name != "latency"}
        changes: dict[str, Any] = {}
        if self._taylor is not None:  # gradients are not there yet; what can be pruned does not depend on them
            changes["criterion"] = "l1"
        elif self._looks_at_activations:  # nor are batches, but the example says what the criterion cannot rank
            changes |= {"batches": [example], "score_forward": call_network}
        try:
            self._plan(network, example, **changes, target=counted or {"macs": 0.9})
        except ValueError as error:
            raise ValueError("\n".join([str(error), *_about(readers, self._network or "")])) from error

    def _plan(self, network: nn.Module, example: Inputs, **changes: Any) -> PruningPlan:
        arguments: dict[str, Any] = {"criterion": self.criterion, "scope": self.scope} | self.plan
        if self.round_to is not None:
            arguments["round_to"] = self.round_to
        arguments["protect"] = [*arguments.get("protect", ()), *self._elsewhere]
        # What shares, floors and limits refer to is the network before the first step.
        arguments["reference"] = Cost(**{field: round(self._reference[name]) for name, field in KEYS.items()})
        arguments["channels"] = {name: before for name, (before, _) in self._channels.items()}
        return plan_filters(network, example, **arguments | changes)

    def _ranked(self, network: nn.Module) -> dict[str, Any]:
        """The arguments by which filters are ranked from data."""
        if self._taylor is not None:
            if not self._taylor.steps:
                raise ValueError(
                    "'taylor' ranks by the gradients of training, and there are none before the first epoch. Set"
                    " start_epoch to 1 or more."
                )
            return {"criterion": self._taylor.criterion(network)}
        if not self._looks_at_activations:
            return {}
        batches = self._validation.batches or self._sample.batches
        if not batches:
            raise ValueError(
                f"{self.criterion!r} looks at data, and nothing was validated or trained yet. Set start_epoch to 1 or"
                " more."
            )
        return {"batches": batches, "score_forward": call_network}

    def _propose(self, network: nn.Module, example: Inputs, position: float) -> dict[str, Any] | None:
        # Counted anew: another tip may have taken something out meanwhile.
        shares, now = self._shares(), self._cost | _as_numbers(count_cost(network, example))
        ranked = self._ranked(network)
        done = position >= 1.0
        if self.filters_per_step is not None:
            number = self.filters_per_step
            if isinstance(number, float):
                number = max(1, round(number * self._reference["filters"]))
            plan = self._plan(network, example, **ranked, filters=max(1, round(number * self._scale)))
            left = _still_above(shares, now, self._reference)
            after = _as_numbers(plan.after)
            done = all(after[name] <= share * self._reference[name] for name, share in left.items() if name in after)
            if done and "latency" not in left:  # no further than asked for
                plan = self._plan(network, example, **ranked, target=left)
        else:
            goals = {name: self.schedule.goal(share, position) for name, share in shares.items()}
            left = _still_above(goals, now, self._reference)
            if not left:
                return None
            if "latency" in left:
                plan = self._plan_for_latency(network, example, left, now, ranked)
            else:
                plan = self._plan(network, example, **ranked, target=left)
        return self._proposal(network, example, plan, done)

    def _plan_for_latency(
        self,
        network: nn.Module,
        example: Inputs,
        goals: dict[str, float],
        now: Mapping[str, float],
        ranked: dict[str, Any],
    ) -> PruningPlan:
        # All in shares of the network as it is now, which is measured beside its pruned copies.
        ahead = {name: goal * self._reference[name] / now[name] for name, goal in goals.items()}

        def plan(target: dict[str, float]) -> PruningPlan:
            return self._plan(network, example, **ranked, target=target, reference=None)

        return plan_for_latency(network, of_size(example, self.latency_batch), ahead, plan)

    def _proposal(self, network: nn.Module, example: Inputs, plan: PruningPlan, done: bool) -> dict[str, Any]:
        cost = _as_numbers(plan.after)
        if "latency" in self.target:
            # Beside the network before this step: what slows the machine down meanwhile slows down both.
            share = time_share(network, plan, of_size(example, self.latency_batch))
            cost["latency"] = self._cost["latency"] * share
            if self.filters_per_step is not None:
                done = done and cost["latency"] <= self._shares()["latency"] * self._reference["latency"]
        removed = plan.before.filters - plan.after.filters
        details: dict[str, Any] = {name: cost[name] / self._reference[name] for name in cost}
        details["channels"] = sum(before - after for before, after in plan.channels.values())
        return {
            "kept": {name: [None if d is None else list(d) for d in dims] for name, dims in plan.kept.items()},
            "channels": {name: list(pair) for name, pair in plan.channels.items()},
            "left_out": dict(plan.left_out) | {n: READ_ELSEWHERE for n in self._elsewhere if n in plan.left_out},
            "cost": cost,
            "what": f"{removed} filters taken out",
            "details": details,
            "done": done,
        }

    def _commit(self, network: nn.Module, proposal: Mapping[str, Any], optimizers: list[Optimizer]) -> None:
        keep_indices(network, real_names(network, proposal["kept"]), optimizers)
        for name, (before, after) in proposal["channels"].items():
            self._channels[name] = [self._channels.get(name, [before])[0], after]
        self._left_out = dict(proposal["left_out"])
        if self._taylor is not None:
            self._taylor.clear()


def _about(readers: Mapping[str, str], network: str) -> list[str]:
    """For an error: which layers stay because of others that did not run, and what to do about it."""
    if not readers:
        return []
    first = [name.split(".")[:-1] for name in readers]
    common = list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*first, strict=False)))
    part = ".".join([*filter(None, [network]), *(parts[0] for parts in common)])
    name, reader = next(iter(readers.items()))
    return [
        f"{len(readers)} of them stay since others, which do not run in this call, may read them ({name} by {reader},"
        f" for example). If that is not so, name the part that is called: module={part or 'its name'!r}."
    ]


def _as_numbers(cost: Cost) -> dict[str, float]:
    return {name: float(getattr(cost, attribute)) for name, attribute in KEYS.items()}


def _still_above(
    goals: Mapping[str, float], now: Mapping[str, float], reference: Mapping[str, float]
) -> dict[str, float]:
    """The goals that the network as it is now does not meet."""
    return {name: goal for name, goal in goals.items() if now[name] > goal * reference[name] * (1 + 1e-9)}
